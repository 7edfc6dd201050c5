"""The last step of a merge: the fragments, streamed into one JSON."""

from __future__ import annotations

import hashlib
import zlib
from collections.abc import Iterable, Iterator, Sequence
from glob import escape
from pathlib import Path
from typing import BinaryIO

from sdxl_core.config import MergeTagsConfig
from sdxl_core.errors import DataError
from sdxl_core.files import atomic_writer, remove_stale_partials, start_writing
from sdxl_core.lock import LOCK_NAME
from sdxl_core.merge.shards import BLOCK_BYTES, MISSING, STAGE, damaged, rejected_rows, work_folder
from sdxl_core.merge.tag_categories import write_tag_categories
from sdxl_core.refs import MergeShardRef, MetadataRef
from sdxl_core.rejected import count_reasons, update_rejected


def join_shards(config: MergeTagsConfig, shards: Iterable[MergeShardRef]) -> MetadataRef:
    """Stream the fragments into `config.out`; nothing is written where it holds exactly that already.

    Args:   shards: in order; they are joined as they come.
    Raises: DataError: no picture has a text.   ShardError: a fragment is not as it was written.   DiskFullError.
    """
    if config.out.exists():  # what it shall hold must be known before anything is written
        shards = list(shards)
        sha256 = _sha256_if_same(config.out, shards)
        if sha256:
            return _joined(config, shards, sha256)
    remove_stale_partials(config.out.parent, name=escape(config.out.name))
    done: list[MergeShardRef] = []
    digest = hashlib.sha256()
    with atomic_writer(config.out) as file:
        for piece in _whole_json(_noted(shards, done, file)):
            digest.update(piece)
            file.write(piece)
        return _joined(config, done, digest.hexdigest())


def _joined(config: MergeTagsConfig, shards: Sequence[MergeShardRef], sha256: str) -> MetadataRef:
    """Tell the rejected pictures and what the whole is, and remove what earlier states of the source left.

    Raises: DataError: no picture has a text.   ShardError.
    """
    num_kept = sum(shard.num_kept for shard in shards)
    rejected = [row for shard in shards for row in rejected_rows(shard)]
    rejected_path = config.out.parent / "rejected.jsonl"
    remove_stale_partials(rejected_path.parent, name=rejected_path.name)
    update_rejected(rejected_path, STAGE, rejected)
    if not num_kept:
        reasons = ", ".join(f"{count} {reason}" for reason, count in count_reasons(rejected).items())
        raise DataError(
            f"{config.source}: none of its {sum(shard.num_seen for shard in shards)} pictures has a usable text "
            f"({reasons}; see {rejected_path}). Tags are looked for in F{config.tag_extension} beside F.png; "
            f"see --tag-extension."
        )
    write_tag_categories(config)
    _remove_old_work(config, shards)
    return MetadataRef(
        path=config.out,
        sha256=sha256,
        num_seen=sum(shard.num_seen for shard in shards),
        num_kept=num_kept,
        num_rejected=len(rejected),
        num_empty=sum(shard.num_empty for shard in shards),
        missing={kind: sum(shard.missing[kind] for shard in shards) for kind in MISSING},
        rejected=rejected_path,
        parents=tuple(shard.digest for shard in shards),
    )


def _noted(shards: Iterable[MergeShardRef], done: list[MergeShardRef], file: BinaryIO) -> Iterator[MergeShardRef]:
    """The shards; what those before gave is on its way to the disk while the next is waited for."""
    for shard in shards:
        done.append(shard)
        yield shard
        start_writing(file)


def _sha256_if_same(out: Path, shards: Sequence[MergeShardRef]) -> str:
    """SHA-256 of `out` if it is what the shards give, else ""."""
    filled = [shard for shard in shards if shard.num_kept]
    size = len("{\n") + len("\n}") + sum(shard.num_bytes for shard in filled) + len(",\n") * (len(filled) - 1)
    if not filled or out.stat().st_size != size:
        return ""
    digest = hashlib.sha256()
    is_same = True
    with open(out, "rb") as file:
        for piece in _whole_json(filled):  # to its end: a damaged fragment is told in any case
            is_same = is_same and file.read(len(piece)) == piece
            digest.update(piece)
    return digest.hexdigest() if is_same else ""


def _whole_json(shards: Iterable[MergeShardRef]) -> Iterator[bytes]:
    """The bytes of the JSON, in pieces. Raises: ShardError: a fragment is not the one that was written."""
    yield b"{\n"
    between = b""
    for shard in shards:
        if not shard.num_kept:
            continue
        yield between
        between = b",\n"
        crc32 = 0
        try:
            with open(shard.path, "rb") as file:
                while piece := file.read(BLOCK_BYTES):
                    crc32 = zlib.crc32(piece, crc32)
                    yield piece
        except FileNotFoundError as error:
            raise damaged(shard, shard.path) from error
        if crc32 != shard.crc32:
            raise damaged(shard, shard.path)
    yield b"\n}"


def _remove_old_work(config: MergeTagsConfig, shards: Sequence[MergeShardRef]) -> None:
    current = {shard.digest[:32] for shard in shards}
    for path in work_folder(config).iterdir():
        if path.name.split(".")[0] not in current and not path.name.startswith(LOCK_NAME):
            path.unlink(missing_ok=True)
