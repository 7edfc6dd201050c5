"""Encode one shard: commit groups of its rows through the engine, written, synced, recorded.

Groups are contiguous ranges of the shard's rows, and batches never leave a group: an interrupted shard continues with
whole groups, so it ends with the same bytes as an undisturbed one.
"""

from __future__ import annotations

import os
from typing import Any

import orjson

from sdxl_core.catalog.images import ImagePlace
from sdxl_core.config import CacheLatentsConfig
from sdxl_core.errors import ShardError
from sdxl_core.files import sync_files
from sdxl_core.latents.engine import EncodedGroup, EncodedPicture, Engine, Picture
from sdxl_core.latents.formats import write_per_image
from sdxl_core.latents.ledger import Group, LatentRow, ShardLedger
from sdxl_core.latents.plan import ledger_path
from sdxl_core.progress import Progress, no_progress
from sdxl_core.refs import LatentShardRef, ShardRef

PlanRejection = tuple[str, str, str]


def shard_is_finished(shard: ShardRef, config: CacheLatentsConfig) -> LatentShardRef | None:
    """A finished shard's reference if every file is as it was written, else None.

    Opens no picture, and latents only where their time differs (a copied cache). The caller holds the output's lock.
    """
    ledger = ShardLedger.read(ledger_path(shard))
    ledger.settle(config.out / "latents")
    return None if ledger.done is None else _reference(shard, ledger)


def encode_shard(
    shard: ShardRef, config: CacheLatentsConfig, device: str, *, progress: Progress = no_progress
) -> LatentShardRef:
    """Encode what the shard's ledger does not know yet. The caller holds the output's lock.

    Args:   device: `cpu`, or a card's number, which this process sees as cuda:0.
    Raises: ShardError: the shard's listing is gone.   DiskFullError: everything committed before is kept.
    """
    finished = shard_is_finished(shard, config)
    if finished is not None:
        progress("latents", finished.num_seen, finished.num_seen)
        return finished
    ledger = ShardLedger.read(ledger_path(shard))
    rows, rejected = _rows(shard)
    groups = [rows[start : start + config.commit_size] for start in range(0, len(rows), config.commit_size)]
    todo = [(number, _pictures(group, config)) for number, group in enumerate(groups) if number not in ledger.groups]
    done = shard.stop - shard.start - sum(len(pictures) for _, pictures in todo)

    def commit(group: EncodedGroup) -> None:
        nonlocal done
        written = [_write(picture, config) for picture in group.pictures]
        sync_files([config.out / "latents" / row.file for row in written])
        ledger.add(Group(number=group.number, rows=tuple(written), rejected=group.rejected, notes=group.notes))
        done += len(written) + len(group.rejected)
        progress("latents", done, shard.stop - shard.start)

    report = Engine(config, device).run(todo, commit)
    ledger.close(
        {
            "rejected": rejected,
            "images_per_s": report.images_per_s,
            "seconds": dict(report.seconds),
            "bound_by": report.bound_by,
            "device": device,
        }
    )
    return _reference(shard, ledger)


def _rows(shard: ShardRef) -> tuple[list[list[Any]], list[PlanRejection]]:
    """The shard's pictures as [key, name, size in bytes, mtime_ns], and those that the plan rejected."""
    try:
        rows: list[list[Any]] = orjson.loads(shard.path.read_bytes())
    except (FileNotFoundError, orjson.JSONDecodeError) as error:
        shard.path.unlink(missing_ok=True)
        raise ShardError(
            f"{shard.path}: the listing of shard {shard.index} is gone or damaged. Run cache-latents again."
        ) from error
    return [row for row in rows if len(row) == 4], [(row[0], row[1], row[2]) for row in rows if len(row) == 3]


def _pictures(rows: list[list[Any]], config: CacheLatentsConfig) -> list[Picture]:
    return [
        Picture(key, ImagePlace(path=config.source / name, name=name, offset=0, num_bytes=num_bytes, in_tar=False))
        for key, name, num_bytes, _ in rows
    ]


def _write(encoded: EncodedPicture, config: CacheLatentsConfig) -> LatentRow:
    file = os.path.splitext(encoded.picture.place.name)[0] + ".npz"
    path = config.out / "latents" / file
    write_per_image(path, encoded.record)
    status = path.stat()
    return LatentRow(
        key=encoded.picture.key,
        file=file,
        num_bytes=status.st_size,
        mtime_ns=status.st_mtime_ns,
        crc32=encoded.record.crc32(),
        bucket=(encoded.bucket.width_px, encoded.bucket.height_px),
        ar_error=encoded.ar_error,
    )


def _reference(shard: ShardRef, ledger: ShardLedger) -> LatentShardRef:
    assert ledger.done is not None
    num_kept, num_rejected = len(ledger.rows()), len(ledger.rejected())
    if num_kept + num_rejected != shard.stop - shard.start:
        raise ShardError(
            f"{ledger.path}: tells of {num_kept} kept and {num_rejected} rejected pictures, and there are "
            f"{shard.stop - shard.start}. Delete this file and run cache-latents again."
        )
    return LatentShardRef(
        index=shard.index,
        digest=shard.digest,
        ledger=ledger.path,
        num_seen=shard.stop - shard.start,
        num_kept=num_kept,
        num_rejected=num_rejected,
        images_per_s=ledger.done["images_per_s"],
        bound_by=ledger.done["bound_by"],
        device=ledger.done["device"],
        seconds=ledger.done["seconds"],
    )
