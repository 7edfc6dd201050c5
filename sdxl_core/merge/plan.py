"""A merge from its settings to the metadata JSON."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import closing
from functools import partial
from typing import TypeVar

from sdxl_core.catalog.records import is_catalog
from sdxl_core.config import MergeTagsConfig
from sdxl_core.dataset import forked
from sdxl_core.merge.folder import (
    MIN_IMAGES_A_PROCESS,
    list_folder,
    merge_part,
    num_parts,
    pieces_of_folder,
    plan_folder,
)
from sdxl_core.merge.join import join_shards
from sdxl_core.merge.shards import any_finished, check_out, merge_lock, shard_is_merged, write_shard
from sdxl_core.progress import Progress, no_progress
from sdxl_core.refs import MergeShardRef, MetadataRef, ShardRef

T = TypeVar("T")


def merge_tags(config: MergeTagsConfig, *, progress: Progress = no_progress) -> MetadataRef:
    """Plan, merge every shard (in several processes where there is much to do) and join.

    Raises: ConfigError, DataError (no pictures; none with text), LockedError, DiskFullError.
    """
    with merge_lock(config):
        return _merge_tags(config, progress)


def _merge_tags(config: MergeTagsConfig, progress: Progress) -> MetadataRef:
    if is_catalog(config.source) or any_finished(config):
        shards = plan_merge(config)
        num_left = sum(shard.stop - shard.start for shard in shards if not shard_is_merged(shard, config))
        merged = _mapped(partial(merge_shard, config=config), shards, num_left)
        num_shards, total = len(shards), shards[-1].stop
    else:
        listing = list_folder(config)
        total = len(listing.names)
        num_shards = num_parts(listing, config)
        work = partial(merge_part, config=config, listing=listing, num_shards=num_shards)
        merged = _mapped(work, range(num_shards), total)

    def told() -> Iterator[MergeShardRef]:
        for shard in merged:
            yield shard
            progress("merge tags", total * (shard.index + 1) // num_shards, total)

    with closing(merged):
        return join_shards(config, told())


def _mapped(work: Callable[[T], MergeShardRef], items: Sequence[T], num_images: int) -> Generator[MergeShardRef]:
    """`work` of every shard, by other processes where that pays, while this one joins what they have finished."""
    count = forked.num_processes(min(len(items), num_images // MIN_IMAGES_A_PROCESS))
    yield from forked.map_forked(work, items, count=count, caller_works=False)


def plan_merge(config: MergeTagsConfig) -> list[ShardRef]:
    """Cut a folder's pictures, or a catalog's records, into contiguous shards.

    Raises: ConfigError, DataError.
    """
    check_out(config.out)
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
