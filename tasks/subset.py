"""Pick pictures by their tags: a list of them, or files placed in parallel shards."""

from prefect import task

from sdxl_core.config import SubsetConfig
from sdxl_core.progress import Progress
from sdxl_core.refs import PlacedShardRef, ShardRef, SubsetPlanRef, SubsetRef
from sdxl_core.subset import run as core_run
from sdxl_core.subset import shard as core_shard
from sdxl_core.subset import stage as core
from tasks.artifacts import ProgressArtifact, show_result
from tasks.policies import CACHED, ONCE, RETRIED


@task(name="list-subset", task_run_name="subset {config.query}", **ONCE, **RETRIED)
def list_subset(config: SubsetConfig) -> SubsetRef:
    """Write the manifest of the pictures that the query picks."""
    ref = core.subset(config, progress=ProgressArtifact("subset-progress", "parts of the folder read"))
    show_result(ref, key="subset", title="Subset")
    return ref


@task(name="plan-subset", task_run_name="plan-subset {config.query}", **ONCE, **RETRIED)
def plan_subset(config: SubsetConfig) -> SubsetPlanRef:
    """Pick pictures by the query, look at what is in the folder, cut the picks into shards."""
    return core.plan_subset(config, progress=ProgressArtifact("subset-looking-progress", "parts of the folder read"))


@task(name="place-shard", task_run_name="place-shard-{shard.index}", **CACHED, **RETRIED)
def place_shard(shard: ShardRef, progress: Progress) -> PlacedShardRef:
    """Copy or link the files of one shard; those that are there already stay."""
    return core_shard.place_shard(shard, progress=progress)


@task(name="join-subset", **ONCE, **RETRIED)
def join_subset(plan: SubsetPlanRef, shards: list[PlacedShardRef]) -> SubsetRef:
    """Write the rejected list and say what the whole subset is."""
    ref = core_run.join_placed(plan, shards)
    show_result(ref, key="subset", title="Subset")
    return ref
