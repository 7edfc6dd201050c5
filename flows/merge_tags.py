"""Flow: tags and captions of a folder into one metadata JSON, in parallel shards."""

from prefect import flow

from flows.fan_out import gather
from flows.resuming import resuming
from sdxl_core.config import MergeTagsConfig
from sdxl_core.merge.shards import merge_lock, shard_is_merged
from sdxl_core.refs import MetadataRef
from tasks.metadata import join_shards, merge_shard, plan_merge

SHARDS_AT_ONCE = 8


@flow(name="merge-tags", description=MergeTagsConfig.__doc__)
@resuming
def merge_tags(config: MergeTagsConfig) -> MetadataRef:
    with merge_lock(config):
        shards = plan_merge(config)
        merged = gather(
            lambda shard: merge_shard.with_options(refresh_cache=not shard_is_merged(shard, config)).submit(
                shard, config
            ),
            shards,
            limit=SHARDS_AT_ONCE,
        )
        return join_shards(config, merged)
