"""What a shard is before and after it is encoded. Light: whoever only resumes needs no torch."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from sdxl_core.catalog.images import ImagePlace, ImageReader
from sdxl_core.config import CacheLatentsConfig
from sdxl_core.errors import ConfigError, DataError
from sdxl_core.latents.ledger import ShardLedger, Summary, finished, read_summary
from sdxl_core.latents.plan import LatentPlan
from sdxl_core.latents.rows import ShardRows
from sdxl_core.refs import LatentShardRef, ShardRef

MOST_SHOWN = 20
TRIED_AGAIN = ("missing_image", "unreadable")  # what may have been a disk's fault, and not the picture's


def chosen_shards(plan: LatentPlan, config: CacheLatentsConfig) -> tuple[ShardRef, ...]:
    """The shards that `only_shards` names, in the plan's order; all where it names none.

    Raises: ConfigError: there is no shard of such a number.
    """
    if not config.only_shards:
        return plan.shards
    unknown = sorted(set(config.only_shards) - {shard.index for shard in plan.shards})
    if unknown:
        raise ConfigError(
            f"only_shards = {shown(config.only_shards)}: there is no shard {shown(unknown)}. These pictures are in "
            f"{len(plan.shards)} shards, numbered from 0; a run's list of failed shards names those to start again."
        )
    return tuple(shard for shard in plan.shards if shard.index in config.only_shards)


def shown(numbers: Sequence[int]) -> str:
    """Numbers of shards for people: the first twenty, and how many more."""
    more = f" and {len(numbers) - MOST_SHOWN} more" if len(numbers) > MOST_SHOWN else ""
    return ", ".join(str(number) for number in numbers[:MOST_SHOWN]) + more


def shard_is_finished(shard: ShardRef, config: CacheLatentsConfig, lock: str = "") -> LatentShardRef | None:
    """A finished shard's reference if every file is as it was written, else None.

    Opens no picture but those that could not be read, and latents only where their time differs (a copied cache). The
    caller holds the output's lock, or works for the process that holds `lock`.
    """
    latents = config.out / "latents"
    summary = finished(shard.path, latents)
    if summary is not None:
        again = _readable_now(shard, [row for row, why in summary.rejected if why.reason in TRIED_AGAIN], config)
        if again:
            settled(shard, latents, lock).lose(again)
            return None
    if summary is None and shard.path.exists():
        ledger = settled(shard, latents, lock)
        if ledger.is_done:
            ledger.summarise()
            summary = read_summary(shard.path)
    return None if summary is None else reference(shard, summary)


def _readable_now(shard: ShardRef, rows: list[int], config: CacheLatentsConfig) -> list[int]:
    """Which of some rows have a picture that can be read."""
    if not rows:
        return []
    places = ShardRows.open(shard.path).places(np.array(rows), config.source)
    return [row for row, place in zip(rows, places, strict=True) if _is_readable(place)]


def _is_readable(place: ImagePlace) -> bool:
    try:
        with ImageReader() as reader:
            reader.read(place)
    except DataError:
        return False
    return True


def settled(shard: ShardRef, latents: Path, lock: str) -> ShardLedger:
    """A shard's ledger, in line with the files on disk."""
    ledger = ShardLedger.read(shard.path, shard.stop - shard.start, lock=lock)
    ledger.settle(latents)
    return ledger


def reference(shard: ShardRef, summary: Summary) -> LatentShardRef:
    """A finished shard's reference."""
    report = summary.report
    return LatentShardRef(
        index=shard.index,
        digest=shard.digest,
        ledger=summary.path,
        num_seen=summary.num_kept + summary.num_rejected + summary.num_removed,
        num_kept=summary.num_kept,
        num_rejected=summary.num_rejected,
        images_per_s=report["images_per_s"],
        bound_by=report["bound_by"],
        device=report["device"],
        seconds=report["seconds"],
    )
