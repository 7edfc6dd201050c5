"""Encode pictures into bucketed latents, one shard a task, on device slots."""

from prefect import task

from sdxl_core.config import CacheLatentsConfig, VerifyLatentsConfig
from sdxl_core.devices import Slots
from sdxl_core.latents import cache as core
from sdxl_core.latents import verify as core_verify
from sdxl_core.refs import LatentSetRef, LatentShardRef, ShardRef, VerifiedRef
from tasks.artifacts import ProgressArtifact, show_buckets, show_page, show_result, show_shards
from tasks.policies import CACHED, ONCE, RETRIED


@task(name="plan-latents", **ONCE, **RETRIED)
def plan_latents(config: CacheLatentsConfig) -> core.LatentPlan:
    """Read the metadata, find the pictures, check the settings, cut what is new into shards."""
    return core.plan_latents(config)


@task(name="encode-shard", task_run_name="encode-shard-{shard.index}", **CACHED, **RETRIED)
def encode_shard(shard: ShardRef, config: CacheLatentsConfig, slots: Slots) -> LatentShardRef:
    """Encode one shard on the next free device; what the shard had committed before is kept."""
    return core.encode_shard_in_slots(shard, config, slots)


@task(name="join-latents", **ONCE, **RETRIED)
def join_latents(
    config: CacheLatentsConfig, plan: core.LatentPlan, shards: list[LatentShardRef], states: list[str]
) -> LatentSetRef:
    """Write meta_lat.json, the index and the rejected list; show histogram and shards, and how each shard ended."""
    ref = core.join_latents(config, plan, progress=ProgressArtifact("latents-join", "entries joined"))
    show_result(ref, key="latents", title="Latents")
    show_buckets(ref)
    show_shards(shards, states)
    show_page(core.draw_page(config, ref), key="latents-page", title="The latents to look at")
    return ref


@task(name="verify-latents", **ONCE, **RETRIED)
def verify_latents(config: VerifyLatentsConfig) -> VerifiedRef:
    """Read every byte of a latent set; with repair, encode what is bad again."""
    ref = core_verify.verify_latents(config, progress=ProgressArtifact("verify-progress", "files verified"))
    show_result(ref, key="verify-latents", title="Verified latents")
    return ref
