"""The last step of a merge: the fragments, streamed into one JSON."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from glob import escape
from pathlib import Path

from sdxl_core.config import MergeTagsConfig
from sdxl_core.errors import DataError
from sdxl_core.files import remove_stale_partials, sha256_file, write_atomic
from sdxl_core.merge.shards import STAGE, damaged, rejected_rows, work_folder
from sdxl_core.refs import MergeShardRef, MetadataRef
from sdxl_core.rejected import count_reasons, update_rejected


def join_shards(config: MergeTagsConfig, shards: Sequence[MergeShardRef]) -> MetadataRef:
    """Stream the fragments into `config.out`; nothing is written where it holds exactly that already.

    Raises: DataError: no picture has a text.   ShardError: a fragment is not as it was written.   DiskFullError.
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
    sha256 = _write_whole_json(config.out, [shard for shard in shards if shard.num_kept])
    _remove_old_work(config, shards)
    return MetadataRef(
        path=config.out,
        sha256=sha256,
        num_seen=sum(shard.num_seen for shard in shards),
        num_kept=num_kept,
        num_rejected=len(rejected),
        num_empty=sum(shard.num_empty for shard in shards),
        rejected=rejected_path,
        parents=tuple(shard.digest for shard in shards),
    )


def _write_whole_json(out: Path, shards: Sequence[MergeShardRef]) -> str:
    """Write `json.dumps(metadata, indent=2)` unless `out` holds those bytes. Returns their SHA-256."""
    size = len("{\n") + len("\n}") + sum(shard.num_bytes for shard in shards) + len(",\n") * (len(shards) - 1)
    if out.exists() and out.stat().st_size == size:
        digest = hashlib.sha256()
        for piece in _whole_json(shards):
            digest.update(piece)
        if sha256_file(out) == digest.hexdigest():
            return digest.hexdigest()
    remove_stale_partials(out.parent, name=escape(out.name))
    digest = hashlib.sha256()

    def hashed() -> Iterator[bytes]:
        for piece in _whole_json(shards):
            digest.update(piece)
            yield piece

    write_atomic(out, hashed())
    return digest.hexdigest()


def _whole_json(shards: Sequence[MergeShardRef]) -> Iterator[bytes]:
    """The bytes of the JSON, in pieces. Raises: ShardError: a fragment is not the one that was written."""
    yield b"{\n"
    for number, shard in enumerate(shards):
        if number:
            yield b",\n"
        digest = hashlib.sha256()
        try:
            with open(shard.path, "rb") as file:
                while piece := file.read(1 << 20):
                    digest.update(piece)
                    yield piece
        except FileNotFoundError as error:
            raise damaged(shard, shard.path) from error
        if digest.hexdigest() != shard.sha256:
            raise damaged(shard, shard.path)
    yield b"\n}"


def _remove_old_work(config: MergeTagsConfig, shards: Sequence[MergeShardRef]) -> None:
    current = {shard.digest[:32] for shard in shards}
    for path in work_folder(config).iterdir():
        if path.name.split(".")[0] not in current:
            path.unlink(missing_ok=True)
