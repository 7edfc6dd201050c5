"""What a shard is before and after it is encoded. Light: whoever only resumes needs no torch."""

from __future__ import annotations

from pathlib import Path

from sdxl_core.config import CacheLatentsConfig
from sdxl_core.latents.ledger import ShardLedger, Summary, finished, read_summary
from sdxl_core.refs import LatentShardRef, ShardRef


def shard_is_finished(shard: ShardRef, config: CacheLatentsConfig) -> LatentShardRef | None:
    """A finished shard's reference if every file is as it was written, else None.

    Opens no picture, and latents only where their time differs (a copied cache). The caller holds the output's lock.
    """
    latents = config.out / "latents"
    summary = finished(shard.path, latents)
    if summary is None and shard.path.exists():
        ledger = settled(shard, latents)
        if ledger.is_done:
            ledger.summarise()
            summary = read_summary(shard.path)
    return None if summary is None else reference(shard, summary)


def settled(shard: ShardRef, latents: Path) -> ShardLedger:
    """A shard's ledger, in line with the files on disk."""
    ledger = ShardLedger.read(shard.path, shard.stop - shard.start)
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
