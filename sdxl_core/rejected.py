"""Nothing vanishes: every picture that is left out keeps its reason, in `rejected.jsonl`."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import orjson

from sdxl_core.errors import DataError
from sdxl_core.files import folder_guard, write_atomic


@dataclass(frozen=True, slots=True, kw_only=True)
class Rejected:
    """One left-out picture. `reason`: one word from docs/rejected.md, e.g. "undecodable"; `detail`: for people.

    `attempts`: how often it was tried, where that was more than once.
    """

    stage: str
    key: str
    reason: str
    detail: str
    attempts: int = 1


def read_rejected(path: Path) -> list[Rejected]:
    """The rows of a `rejected.jsonl`, [] where there is no such file.

    Raises: DataError: a line that is none of ours.
    """
    if not path.exists():
        return []
    try:
        return [Rejected(**orjson.loads(line)) for line in path.read_bytes().splitlines() if line.strip()]
    except (orjson.JSONDecodeError, TypeError) as error:
        raise DataError(
            f"{path}: damaged, or not made by sdxl-flows ({error}). Delete it and run the same command again: what was "
            f"rejected is known to the stages and is listed anew."
        ) from error


def update_rejected(path: Path, stage: str, rows: Iterable[Rejected]) -> int:
    """Replace one stage's rows in `rejected.jsonl`, keep the other stages' rows and places. Returns how many it has.

    What is there already is not written again; an empty list makes an empty file.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with folder_guard(path.parent):  # two stages may end at once
        return _update(path, stage, list(rows))


def _update(path: Path, stage: str, new: list[Rejected]) -> int:
    old = read_rejected(path)
    if path.exists() and [row for row in old if row.stage == stage] == new:
        return len(new)
    first = next((place for place, row in enumerate(old) if row.stage == stage), len(old))
    before, after = ([row for row in part if row.stage != stage] for part in (old[:first], old[first:]))
    rows = before + new + after
    write_atomic(path, map(rejected_line, rows), sync=bool(rows))  # an empty file has nothing to lose
    return len(new)


def write_rejected(path: Path, rows: Iterable[Rejected]) -> int:
    """Write a whole list of rejections as it comes, without holding it. Returns how many rows it has."""
    count = 0

    def lines() -> Iterator[bytes]:
        nonlocal count
        for row in rows:
            count += 1
            yield rejected_line(row)

    write_atomic(path, lines())
    return count


def count_reasons(rows: Iterable[Rejected]) -> dict[str, int]:
    """Rows by reason, most frequent first, and of equals by name."""
    return dict(sorted(Counter(row.reason for row in rows).items(), key=lambda item: (-item[1], item[0])))


def rejected_line(row: Rejected) -> bytes:
    """The line of `rejected.jsonl` that stands for a row."""
    texts = (row.stage, row.key, row.reason, row.detail)
    names = ("stage", "key", "reason", "detail")
    fields: dict[str, str | int] = {
        name: text.encode("utf-8", "replace").decode() for name, text in zip(names, texts, strict=True)
    }
    if row.attempts > 1:
        fields["attempts"] = row.attempts
    return orjson.dumps(fields, option=orjson.OPT_APPEND_NEWLINE)
