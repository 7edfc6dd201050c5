"""A merge from its settings to the metadata JSON."""

from __future__ import annotations

from functools import partial
from pathlib import Path

from sdxl_core.catalog.records import is_catalog
from sdxl_core.config import MergeTagsConfig
from sdxl_core.dataset import forked
from sdxl_core.errors import ConfigError
from sdxl_core.merge.folder import MIN_IMAGES_A_PROCESS, pieces_of_folder, plan_folder
from sdxl_core.merge.join import join_shards
from sdxl_core.merge.shards import refuse_foreign, shard_is_merged, write_shard
from sdxl_core.progress import Progress, no_progress
from sdxl_core.refs import MergeShardRef, MetadataRef, ShardRef


def merge_tags(config: MergeTagsConfig, *, progress: Progress = no_progress) -> MetadataRef:
    """Plan, merge every shard (in several processes where there is much to do) and join.

    Raises: ConfigError, DataError (no pictures; none with text), DiskFullError.
    """
    shards = plan_merge(config)
    merged: list[MergeShardRef] = []
    num_left = sum(shard.stop - shard.start for shard in shards if not shard_is_merged(shard, config))
    count = forked.num_processes(min(len(shards), num_left // MIN_IMAGES_A_PROCESS))
    for shard in forked.map_forked(partial(merge_shard, config=config), shards, count=count):
        merged.append(shard)
        progress("merge tags", shards[len(merged) - 1].stop, shards[-1].stop)
    return join_shards(config, merged)


def plan_merge(config: MergeTagsConfig) -> list[ShardRef]:
    """Cut a folder's pictures, or a catalog's records, into at most `num_shards` contiguous shards.

    Raises: ConfigError, DataError.
    """
    _check_out(config.out)
    if is_catalog(config.source):
        from sdxl_core.merge.records import plan_records

        return plan_records(config)
    return plan_folder(config)


def merge_shard(shard: ShardRef, config: MergeTagsConfig) -> MergeShardRef:
    """Make one shard's fragment of the JSON; a finished fragment is not made again. Raises: as `write_shard`."""
    if is_catalog(config.source):
        from sdxl_core.merge.records import pieces_of_records

        return write_shard(shard, config, pieces_of_records)
    return write_shard(shard, config, pieces_of_folder)


def _check_out(out: Path) -> None:
    if out.is_dir():
        raise ConfigError(f"out = {out}: this is a folder; name the JSON file to write in it.")
    refuse_foreign(out)
    for parent in out.parents:
        if parent.exists():
            if not parent.is_dir():
                raise ConfigError(f"out = {out}: {parent} is a file, not a folder. Choose another place.")
            return
