"""Flow: encode pictures into bucketed latents on every device of this machine, or of a Ray cluster."""

from prefect import flow

from flows.fan_out import gather
from flows.resuming import resuming
from sdxl_core.config import CacheLatentsConfig
from sdxl_core.engines import open_slots
from sdxl_core.latents.cache import chosen_shards, shard_is_finished, watch_progress
from sdxl_core.lock import output_lock
from sdxl_core.refs import LatentSetRef
from tasks.artifacts import ProgressArtifact
from tasks.latents import encode_shard, join_latents, plan_latents


@flow(name="cache-latents", description=CacheLatentsConfig.__doc__)
@resuming
def cache_latents(config: CacheLatentsConfig) -> LatentSetRef:
    engine = open_slots(config)
    with output_lock(config.out / "latents", purpose="cache-latents"):
        plan = plan_latents(config)
        chosen, settings = chosen_shards(plan, config), config.of_all_shards()
        progress = ProgressArtifact("latents-progress", "pictures encoded")
        with engine as slots, watch_progress(plan, config, progress):
            shards = gather(
                lambda shard: encode_shard.with_options(
                    refresh_cache=shard_is_finished(shard, config) is None  # a cached result cannot see lost files
                ).submit(shard, settings, slots),
                chosen,
                limit=len(slots.slots),
            )
        return join_latents(config, plan, list(shards), shards.states)
