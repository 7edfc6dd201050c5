"""One shard of a merge: from what it was planned to hold to a finished fragment of the JSON."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple

import orjson

from sdxl_core.config import MergeTagsConfig
from sdxl_core.errors import ConfigError, DataError, ShardError
from sdxl_core.files import atomic_writer, write_atomic
from sdxl_core.refs import MergeShardRef, ShardRef, to_json
from sdxl_core.rejected import Rejected, read_rejected, update_rejected

STAGE = "merge"
FORMAT = 3


class Piece(NamedTuple):
    """Consecutive entries as JSON text, joined as the JSON joins them."""

    text: bytes
    num_entries: int


@dataclass(slots=True)
class Counts:
    """What one shard has besides its entries."""

    rejected: list[Rejected] = field(default_factory=list)
    num_empty: int = 0
    num_failed_reads: int = 0


def refuse(key: str, reason: str, detail: str) -> Rejected:
    return Rejected(stage=STAGE, key=key, reason=reason, detail=detail)


def write_shard(
    shard: ShardRef,
    config: MergeTagsConfig,
    pieces_of: Callable[[MergeTagsConfig, dict[str, Any], Counts], Iterator[Piece]],
) -> MergeShardRef:
    """Write one shard's fragment of the JSON; a finished fragment is not made again.

    Where a text file could not be read for reasons outside it (permissions, a failing disk), its picture is rejected
    and the shard is not remembered as finished: the next run tries it again.
    Raises: DataError: what the shard was planned to hold is gone (the out folder was cleaned meanwhile).
    DiskFullError.
    """
    finished = finished_shard(shard)
    if finished is not None:
        return finished
    try:
        stored = orjson.loads(shard.path.read_bytes())
    except (FileNotFoundError, orjson.JSONDecodeError) as error:
        raise DataError(f"{shard.path}: the listing of shard {shard.index} is gone. Run the merge again.") from error
    counts = Counts()
    digest, num_bytes, num_kept = hashlib.sha256(), 0, 0
    with atomic_writer(fragment_path(shard)) as file:
        for piece in pieces_of(config, stored, counts):
            text = b",\n" * bool(num_kept) + piece.text
            file.write(text)
            digest.update(text)
            num_bytes += len(text)
            num_kept += piece.num_entries
    if counts.rejected:
        update_rejected(_rejected_path(shard), STAGE, counts.rejected)
    ref = MergeShardRef(
        index=shard.index,
        digest=shard.digest,
        path=fragment_path(shard),
        sha256=digest.hexdigest(),
        num_bytes=num_bytes,
        rejected=_rejected_path(shard),
        num_seen=num_kept + len(counts.rejected),
        num_kept=num_kept,
        num_rejected=len(counts.rejected),
        num_empty=counts.num_empty,
    )
    if not counts.num_failed_reads:
        write_atomic(_result_path(shard), orjson.dumps(to_json(ref)))
    return ref


def shard_is_merged(shard: ShardRef, config: MergeTagsConfig) -> bool:
    """Whether the shard's fragment and its rejected rows are there, with the size they were written with."""
    return finished_shard(shard) is not None


def finished_shard(shard: ShardRef) -> MergeShardRef | None:
    """The finished shard as its result file tells it, None where a part of it is missing."""
    try:
        stored = MergeShardRef(**orjson.loads(_result_path(shard).read_bytes()))
        there = fragment_path(shard).stat().st_size
    except (FileNotFoundError, orjson.JSONDecodeError):
        return None
    if there != stored.num_bytes or (stored.num_rejected and not _rejected_path(shard).exists()):
        return None
    return replace(stored, index=shard.index, path=fragment_path(shard), rejected=_rejected_path(shard))


def rejected_rows(shard: MergeShardRef) -> list[Rejected]:
    """The shard's rejections. Raises: ShardError: they are not what was written."""
    try:
        rows = read_rejected(shard.rejected) if shard.num_rejected else []
    except DataError:
        rows = []
    if len(rows) != shard.num_rejected:
        raise damaged(shard, shard.rejected)
    return rows


def damaged(shard: MergeShardRef, path: Path) -> ShardError:
    """The error for a shard whose stored files are not what was written; it is forgotten, so that it is redone."""
    shard.path.with_suffix(".result.json").unlink(missing_ok=True)
    path.unlink(missing_ok=True)
    return ShardError(
        f"{path}: this part of shard {shard.index} was changed or removed after it was written. Nothing was taken from "
        f"it; run the same command again, it makes that shard anew."
    )


def refuse_foreign(out: Path) -> None:
    """Refuse to replace a file that is no JSON object. Raises: ConfigError."""
    if out.is_file() and out.stat().st_size:
        with open(out, "rb") as file:
            if file.read(1) != b"{":
                raise ConfigError(
                    f"out = {out}: there is a file that is no metadata JSON; it is not overwritten. Name another file."
                )


def work_folder(config: MergeTagsConfig) -> Path:
    """Where the shards' listings and fragments are kept, beside the output."""
    return config.out.parent / f".{config.out.name}.work"


def shard_path(config: MergeTagsConfig, digest: str) -> Path:
    """File of what a shard is planned to hold."""
    return work_folder(config) / f"{digest[:32]}.rows.json"


def fragment_path(shard: ShardRef) -> Path:
    return shard.path.with_suffix("").with_suffix(".fragment")


def _rejected_path(shard: ShardRef) -> Path:
    return shard.path.with_suffix("").with_suffix(".rejected.jsonl")


def _result_path(shard: ShardRef) -> Path:
    return shard.path.with_suffix("").with_suffix(".result.json")
