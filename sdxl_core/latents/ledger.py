"""What a shard has finished: one JSON line a commit group, appended after the group's files were synced.

A line that was cut by a crash does not count, and neither does a row whose file is gone, or has another size or time
than it was written with. The last line says that the whole shard is done.
"""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import orjson

from sdxl_core.files import disk_errors, sync_folder, write_atomic

LEDGER_FOLDER = ".ledger"


@dataclass(frozen=True, slots=True, kw_only=True)
class LatentRow:
    """One written latent file. `file`: POSIX path below the latents folder; `bucket`: width and height in pixels."""

    key: str
    file: str
    num_bytes: int
    mtime_ns: int
    crc32: int
    bucket: tuple[int, int]
    ar_error: float

    def is_there(self, latents: Path) -> bool:
        """Whether the file is as it was written, by size and modification time."""
        try:
            status = os.stat(latents / self.file)
        except (FileNotFoundError, NotADirectoryError):
            return False
        return (status.st_size, status.st_mtime_ns) == (self.num_bytes, self.mtime_ns)


@dataclass(frozen=True, slots=True, kw_only=True)
class Group:
    """A commit group: its number in the shard's plan, what it wrote, and what it rejected as (key, reason, detail)."""

    number: int
    rows: tuple[LatentRow, ...]
    rejected: tuple[tuple[str, str, str], ...]
    notes: tuple[str, ...] = ()


@dataclass(slots=True, kw_only=True)
class ShardLedger:
    """A shard's ledger as read: groups by number (a later line wins) and the closing record, None while unfinished."""

    path: Path
    groups: dict[int, Group] = field(default_factory=dict)
    done: dict[str, Any] | None = None

    @classmethod
    def read(cls, path: Path) -> ShardLedger:
        """Every whole line of the file; an empty ledger where there is none."""
        ledger = cls(path=path)
        try:
            lines = path.read_bytes().split(b"\n")
        except FileNotFoundError:
            return ledger
        for line in lines[:-1]:  # what follows the last line break was cut short
            try:
                record = orjson.loads(line)
            except orjson.JSONDecodeError:
                break
            if "done" in record:
                ledger.done = record["done"]
            else:
                ledger.groups[record["group"]] = _group(record)
        return ledger

    def rows(self) -> list[LatentRow]:
        return [row for number in sorted(self.groups) for row in self.groups[number].rows]

    def rejected(self) -> list[tuple[str, str, str]]:
        """(key, reason, detail) of every rejected picture: those of the plan, then those of the groups."""
        planned = [(key, reason, detail) for key, reason, detail in (self.done or {}).get("rejected", [])]
        return planned + [row for number in sorted(self.groups) for row in self.groups[number].rejected]

    def drop_lost(self, latents: Path) -> None:
        """Forget the groups that have lost or altered files, and the closing record with them. Rewrites the file."""
        kept = {n: group for n, group in self.groups.items() if all(row.is_there(latents) for row in group.rows)}
        if len(kept) == len(self.groups):
            return
        self.groups, self.done = kept, None
        write_atomic(self.path, (_line(_group_record(kept[number])) for number in sorted(kept)))

    def add(self, group: Group) -> None:
        """Record a group whose files are synced."""
        self._append(_group_record(group))
        self.groups[group.number] = group

    def close(self, record: dict[str, Any]) -> None:
        """Record that the shard is done."""
        self._append({"done": record})
        self.done = record

    def _append(self, record: dict[str, Any]) -> None:
        with disk_errors(self.path):
            self.path.parent.mkdir(parents=True, exist_ok=True)
            new = not self.path.exists()
            with open(self.path, "ab+") as file:
                _cut_torn_line(file)
                file.write(_line(record))
                file.flush()
                os.fsync(file.fileno())
            if new:
                sync_folder(self.path.parent)


def _cut_torn_line(file: Any) -> None:
    """Remove what a crash left after the last line break."""
    file.seek(0)
    whole = file.read().rfind(b"\n") + 1
    file.truncate(whole)
    file.seek(whole)


def _line(record: dict[str, Any]) -> bytes:
    return orjson.dumps(record, option=orjson.OPT_APPEND_NEWLINE)


def _group_record(group: Group) -> dict[str, Any]:
    rows = [[getattr(row, name) for name in LatentRow.__slots__] for row in group.rows]
    return {"group": group.number, "rows": rows, "rejected": group.rejected, "notes": group.notes}


def _group(record: dict[str, Any]) -> Group:
    rows = (dict(zip(LatentRow.__slots__, row, strict=True)) for row in record["rows"])
    return Group(
        number=record["group"],
        rows=tuple(LatentRow(**row | {"bucket": tuple(row["bucket"])}) for row in rows),
        rejected=tuple((key, reason, detail) for key, reason, detail in record["rejected"]),
        notes=tuple(record["notes"]),
    )
