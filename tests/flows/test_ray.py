"""The same flow on a Ray cluster of two nodes (two sets of Ray's processes on this machine)."""

import os
import signal
import threading
import time
from pathlib import Path
from typing import Any

import pytest
from support.ray_cluster import two_nodes
from support.runs import task_states

from sdxl_core.config import CacheLatentsConfig, MergeTagsConfig
from sdxl_core.ray_slots import RaySlot

pytestmark = pytest.mark.usefixtures("prefect_server")


def made_in(out: Path) -> dict[str, bytes]:
    """Everything but the account of how it was made: latents, metadata, index, rejected list."""
    return {
        str(path.relative_to(out)): path.read_bytes()
        for path in [*out.glob("latents/**/*.npz"), *out.glob("latents/index*.arrow"), *out.glob("*.json*")]
        if path.is_file()
    }


@pytest.fixture
def metadata(pictures: Path, tmp_path: Path) -> Path:
    from sdxl_core.merge.plan import merge_tags

    return merge_tags(MergeTagsConfig(source=pictures, out=tmp_path / "meta_cap_dd.json")).path


def test_ray_gives_the_same_bytes_though_an_actor_is_killed(
    pictures: Path, metadata: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from flows.cache_latents import cache_latents
    from sdxl_core.latents.cache import cache_latents as without_slots

    config = CacheLatentsConfig(
        source=pictures, metadata=metadata, out=tmp_path / "here", vae="tiny", resolution_px=128,
        min_bucket_px=64, max_bucket_px=256, shard_size=13, commit_size=4, devices="cpu",
    )  # fmt: skip
    expected = without_slots(config)
    ray = {"out": tmp_path / "ray", "engine": "ray", "ray_address": "auto", "devices": "cpu,cpu"}
    on_ray = config.model_copy(update=ray)
    asked: list[int] = []  # the process of the actor that each call went to
    killed: list[int] = []
    run_on_actor = RaySlot.run

    def run_and_kill_once(slot: RaySlot, function: Any, *arguments: Any) -> Any:
        pid = run_on_actor(slot, os.getpid)
        asked.append(pid)
        if asked != [pid]:
            return run_on_actor(slot, function, *arguments)
        killer = threading.Thread(target=kill_when_committed, args=(pid,))
        killer.start()
        try:
            return run_on_actor(slot, function, *arguments)
        finally:
            killer.join(timeout=60)

    def kill_when_committed(pid: int) -> None:
        while not any((tmp_path / "ray" / "latents").glob("*.npz")):
            time.sleep(0.01)
        os.kill(pid, signal.SIGKILL)
        killed.append(pid)

    monkeypatch.setattr(RaySlot, "run", run_and_kill_once)
    with two_nodes(num_cpus=1):
        ref = cache_latents(on_ray)
        assert killed == asked[:1] and set(asked) > set(killed), "others did what the killed one left"
        assert ref.num_kept == expected.num_kept == 48
        assert made_in(tmp_path / "ray") == made_in(tmp_path / "here")
        assert task_states("cache-latents", num_tasks=6)["encode-shard: Completed"] == 4
        assert cache_latents(on_ray) == ref
    states = task_states("cache-latents", num_tasks=6)
    assert states["encode-shard: Cached"] == 4 and states["encode-shard: Completed"] == 0
