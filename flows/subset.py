"""Flow: pick pictures by tags and list them, or copy or link their files in parallel shards."""

from prefect import flow

from flows.fan_out import gather
from flows.resuming import resuming
from sdxl_core.config import SubsetConfig
from sdxl_core.progress import Summed
from sdxl_core.refs import SubsetRef
from sdxl_core.subset.shard import shard_is_placed
from sdxl_core.subset.stage import places_files, subset_lock
from tasks.artifacts import ProgressArtifact
from tasks.subset import join_subset, list_subset, place_shard, plan_subset

SHARDS_AT_ONCE = 8


@flow(name="subset", description=SubsetConfig.__doc__)
@resuming
def subset(config: SubsetConfig) -> SubsetRef:
    if not places_files(config):
        return list_subset(config)
    with subset_lock(config):
        plan = plan_subset(config)
        progress = Summed(ProgressArtifact("subset-progress", "pictures placed"), "subset", plan.shards[-1].stop)
        placed = gather(
            lambda shard: place_shard.with_options(refresh_cache=not shard_is_placed(shard)).submit(
                shard, progress.part()
            ),
            plan.shards,
            limit=SHARDS_AT_ONCE,
        )
        return join_subset(plan, placed)
