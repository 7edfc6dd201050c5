"""Encode pictures into bucketed latents, one shard a task, on device slots."""

from prefect import task

from sdxl_core.config import CacheLatentsConfig
from sdxl_core.devices import Slots
from sdxl_core.latents import cache as core
from sdxl_core.refs import LatentSetRef, LatentShardRef, ShardRef
from tasks.artifacts import show_buckets, show_result, show_shards
from tasks.policies import CACHED, ONCE, RETRIED


@task(name="plan-latents", **ONCE, **RETRIED)
def plan_latents(config: CacheLatentsConfig) -> core.LatentPlan:
    """Read the metadata, find the pictures, check the settings, cut into shards."""
    return core.plan_latents(config)


@task(name="encode-shard", task_run_name="encode-shard-{shard.index}", **CACHED, **RETRIED)
def encode_shard(shard: ShardRef, config: CacheLatentsConfig, slots: Slots) -> LatentShardRef:
    """Encode one shard on the next free device; what the shard had committed before is kept."""
    with slots.checkout() as slot:
        return slot.run(core.encode_shard, shard, config, slot.device)


@task(name="join-latents", **ONCE, **RETRIED)
def join_latents(config: CacheLatentsConfig, shards: list[LatentShardRef]) -> LatentSetRef:
    """Write meta_lat.json and the rejected list; show histogram and shards."""
    ref = core.join_latents(config, shards)
    show_result(ref, key="latents", title="Latents")
    show_buckets(ref)
    show_shards(shards)
    return ref
