"""Tags and captions of a folder into one metadata JSON, in parallel shards."""

from prefect import task

from sdxl_core.config import MergeTagsConfig
from sdxl_core.merge import join as core_join
from sdxl_core.merge import plan as core
from sdxl_core.refs import MergeShardRef, MetadataRef, ShardRef
from tasks.artifacts import show_result
from tasks.policies import CACHED, ONCE, RETRIED


@task(name="plan-merge", **ONCE, **RETRIED)
def plan_merge(config: MergeTagsConfig) -> list[ShardRef]:
    """List the pictures once and cut the list into shards."""
    return core.plan_merge(config)


@task(name="merge-shard", task_run_name="merge-shard-{shard.index}", **CACHED, **RETRIED)
def merge_shard(shard: ShardRef, config: MergeTagsConfig) -> MergeShardRef:
    """Read the text files of one shard."""
    return core.merge_shard(shard, config)


@task(name="join-shards", **ONCE, **RETRIED)
def join_shards(config: MergeTagsConfig, shards: list[MergeShardRef]) -> MetadataRef:
    """Stream the shards into the metadata JSON."""
    ref = core_join.join_shards(config, shards)
    show_result(ref, key="merge", title="Metadata")
    return ref
