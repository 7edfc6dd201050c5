"""One shard of a merge: from what it was planned to hold to a finished fragment of the JSON."""

from __future__ import annotations

import zlib
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass, field, replace
from functools import reduce
from pathlib import Path
from typing import Any, NamedTuple

import orjson

from sdxl_core.config import MergeTagsConfig
from sdxl_core.errors import ConfigError, DataError, ShardError
from sdxl_core.files import atomic_writer, write_atomic
from sdxl_core.lock import output_lock
from sdxl_core.processes import boot_id
from sdxl_core.refs import MergeShardRef, ShardRef, to_json
from sdxl_core.rejected import Rejected, read_rejected, write_rejected

STAGE = "merge"
FORMAT = 5
MISSING = ("image", "tags", "caption", "text")
BLOCK_BYTES = 1 << 18


class Piece(NamedTuple):
    """Consecutive entries as JSON text, joined as the JSON joins them."""

    text: bytes
    num_entries: int


@dataclass(slots=True)
class Counts:
    """What one shard has besides its entries. `missing`: see MetadataRef."""

    rejected: list[Rejected] = field(default_factory=list)
    missing: Counter[str] = field(default_factory=Counter)
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
    written = write_fragment(fragment_path(shard), pieces_of(config, stored, counts))
    return remember(shard, written, counts)


class Written(NamedTuple):
    """A fragment as it was written."""

    crc32: int
    num_bytes: int
    num_entries: int


def write_fragment(path: Path, pieces: Iterator[Piece]) -> Written:
    """Write pieces as one fragment. It is not synced: see `finished_shard`. Raises: DiskFullError, DataError."""
    crc32 = num_bytes = num_entries = 0
    with atomic_writer(path, sync=False) as file:
        for piece in pieces:
            for text in (b",\n", piece.text) if num_entries else (piece.text,):
                file.write(text)
                crc32 = zlib.crc32(text, crc32)
                num_bytes += len(text)
            num_entries += piece.num_entries
    return Written(crc32, num_bytes, num_entries)


def remember(shard: ShardRef, written: Written, counts: Counts) -> MergeShardRef:
    """Say that a shard's fragment is finished, unless a text file of it could not be read."""
    if counts.rejected:
        write_rejected(_rejected_path(shard), counts.rejected)
    ref = MergeShardRef(
        index=shard.index,
        digest=shard.digest,
        path=fragment_path(shard),
        crc32=written.crc32,
        num_bytes=written.num_bytes,
        rejected=_rejected_path(shard),
        num_seen=written.num_entries + len(counts.rejected),
        num_kept=written.num_entries,
        num_rejected=len(counts.rejected),
        num_empty=counts.num_empty,
        missing={kind: counts.missing[kind] for kind in MISSING},
    )
    if not counts.num_failed_reads:
        _write_result(shard, ref)
    return ref


def _write_result(shard: ShardRef, ref: MergeShardRef) -> None:
    write_atomic(_result_path(shard), orjson.dumps({"boot": boot_id(), "shard": to_json(ref)}), sync=False)


def shard_is_merged(shard: ShardRef, config: MergeTagsConfig) -> bool:
    """Whether the shard's fragment and its rejected rows are there, with the size they were written with."""
    return finished_shard(shard) is not None


def finished_shard(shard: ShardRef) -> MergeShardRef | None:
    """The finished shard as its result file tells it, None where a part of it is missing.

    Fragments and results are not synced: a power cut may take or tear what was written before it. So of what another
    boot of the system wrote the content is compared first, once; of what this one wrote, only the size.
    """
    try:
        told = orjson.loads(_result_path(shard).read_bytes())
        stored = MergeShardRef(**told["shard"])
        there = fragment_path(shard).stat().st_size
    except (FileNotFoundError, orjson.JSONDecodeError, KeyError, TypeError):
        return None
    if there != stored.num_bytes or (stored.num_rejected and not _rejected_path(shard).exists()):
        return None
    ref = replace(stored, index=shard.index, path=fragment_path(shard), rejected=_rejected_path(shard))
    if not boot_id() or told["boot"] != boot_id():
        if _crc32_of(ref.path) != ref.crc32 or len(_stored_rows(ref)) != ref.num_rejected:
            return None
        _write_result(shard, ref)
    return ref


def _crc32_of(path: Path) -> int:
    with open(path, "rb") as file:
        return reduce(lambda crc32, block: zlib.crc32(block, crc32), iter(lambda: file.read(BLOCK_BYTES), b""), 0)


def any_finished(config: MergeTagsConfig) -> bool:
    """Whether there is a result of an earlier run, of whatever state of the source."""
    return any(work_folder(config).glob("*.result.json"))


def rejected_rows(shard: MergeShardRef) -> list[Rejected]:
    """The shard's rejections. Raises: ShardError: they are not what was written."""
    rows = _stored_rows(shard)
    if len(rows) != shard.num_rejected:
        raise damaged(shard, shard.rejected)
    return rows


def _stored_rows(shard: MergeShardRef) -> list[Rejected]:
    try:
        return read_rejected(shard.rejected) if shard.num_rejected else []
    except DataError:
        return []


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


def merge_lock(config: MergeTagsConfig) -> AbstractContextManager[None]:
    """Hold one output against other merges. Raises: LockedError, ConfigError (`out` cannot be one)."""
    check_out(config.out)
    return output_lock(work_folder(config), purpose="merge-tags")


def check_out(out: Path) -> None:
    """Raises: ConfigError: this cannot become a metadata JSON, or would overwrite something else."""
    if out.is_dir():
        raise ConfigError(f"out = {out}: this is a folder; name the JSON file to write in it.")
    refuse_foreign(out)
    for parent in out.parents:
        if parent.exists():
            if not parent.is_dir():
                raise ConfigError(f"out = {out}: {parent} is a file, not a folder. Choose another place.")
            return


def shard_path(config: MergeTagsConfig, digest: str) -> Path:
    """File of what a shard is planned to hold."""
    return work_folder(config) / f"{digest[:32]}.rows.json"


def fragment_path(shard: ShardRef) -> Path:
    return shard.path.with_suffix("").with_suffix(".fragment")


def _rejected_path(shard: ShardRef) -> Path:
    return shard.path.with_suffix("").with_suffix(".rejected.jsonl")


def _result_path(shard: ShardRef) -> Path:
    return shard.path.with_suffix("").with_suffix(".result.json")
