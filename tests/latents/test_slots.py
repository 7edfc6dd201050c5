"""Shards on device slots: the process stays, and so does the VAE in it."""

from operator import methodcaller
from typing import Any

from support.latent_sets import collection

from sdxl_core.devices import Slots
from sdxl_core.latents.cache import encode_shard_in_slots, plan_latents
from sdxl_core.latents.vae import load_encoder


def test_a_slot_loads_the_vae_once_for_all_its_shards(make_job: Any) -> None:
    config = make_job(collection(9), shard_size=3)
    plan = plan_latents(config)
    with Slots(["cpu"]) as slots:
        encoded = [encode_shard_in_slots(shard, config, slots) for shard in plan.shards]
        told = map(tuple, map(methodcaller("cache_info"), [load_encoder]))  # called there, where it is unpickled
        ((hits, misses, _, size),) = slots.slots[0].run(list, told)
    assert sum(shard.num_kept for shard in encoded) == 9 and len(encoded) == 3
    assert (misses, size) == (1, 1) and hits >= 2
