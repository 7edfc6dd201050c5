"""A shard is shown as `Cached` only while its files are what was written."""

from pathlib import Path

import pytest
from support.service import Service
from support.system_runs import SMALL, latents_config, latents_of, parameters, task_runs_of

pytestmark = pytest.mark.system


def test_shards_with_a_deleted_and_an_altered_file_are_redone_the_others_cached(
    service: Service, pictures: Path, tmp_path: Path
) -> None:
    config = latents_config(pictures, tmp_path, **SMALL, shard_size=12)
    service.wait_for(service.submit("cache-latents/cache-latents", parameters(config)), "Completed")
    whole = latents_of(tmp_path)
    deleted, altered = tmp_path / "latents" / "scene_02.npz", tmp_path / "latents" / "scene_40.npz"
    deleted.unlink()
    content = bytearray(altered.read_bytes())
    content[len(content) // 2] ^= 1
    altered.write_bytes(content)  # as long as before

    run = service.submit("cache-latents/cache-latents", parameters(config))
    service.wait_for(run, "Completed")
    assert latents_of(tmp_path) == whole
    shards = {task.name: task.state_name for task in task_runs_of(service, run, 7) if "encode-shard" in task.name}
    assert shards == {
        "encode-shard-0": "Completed", "encode-shard-1": "Cached", "encode-shard-2": "Cached",
        "encode-shard-3": "Completed", "encode-shard-4": "Cached",
    }  # fmt: skip
