"""The flows, in Prefect's own test server: the whole path, what a second run does, what a killed process does."""

import json
import os
import signal
import threading
import time
from pathlib import Path
from typing import Any

import pytest
from support.runs import task_states

from sdxl_core.config import CacheLatentsConfig, JobConfig, MergeTagsConfig
from sdxl_core.demo import demo_job
from sdxl_core.devices import Slot
from sdxl_core.errors import ConfigError
from sdxl_core.files import sha256_file
from sdxl_core.refs import SubsetRef
from sdxl_core.rejected import read_rejected

pytestmark = pytest.mark.usefixtures("prefect_server")


@pytest.fixture(scope="module")
def job(pictures: Path, tmp_path_factory: pytest.TempPathFactory) -> JobConfig:
    """The demo's job, smaller: 128 px, four steps."""
    values = demo_job(source=pictures, out=tmp_path_factory.mktemp("job") / "run").model_dump()
    values["latents"] |= {"resolution_px": 128, "min_bucket_px": 64, "max_bucket_px": 256}
    values["train"] |= {"max_train_steps": 4, "save_every_steps": 2, "sample_size_px": 64, "sample_inference_steps": 2}
    return JobConfig.model_validate(values)


def picked_by(job: JobConfig) -> SubsetRef:
    """What the finished run's subset stage gave."""
    return SubsetRef(**json.loads((job.out / "run.json").read_text())["stages"]["subset"]["result"])


def artifacts(*keys: str) -> dict[str, str]:
    """The text of the newest artifact of each key, as the server has it."""
    from prefect.client.orchestration import get_client
    from prefect.client.schemas.filters import ArtifactFilter, ArtifactFilterKey
    from prefect.client.schemas.sorting import ArtifactSort

    with get_client(sync_client=True) as client:
        found = client.read_artifacts(
            artifact_filter=ArtifactFilter(key=ArtifactFilterKey(any_=list(keys))), sort=ArtifactSort.CREATED_DESC
        )
    return {str(artifact.key): str(artifact.data) for artifact in reversed(found)}


def files_below(folder: Path) -> dict[str, tuple[int, int]]:
    return {
        str(path.relative_to(folder)): (path.stat().st_size, path.stat().st_mtime_ns)
        for path in folder.rglob("*")
        if path.is_file()
    }


def test_the_whole_path_leaves_everything_and_a_second_run_redoes_nothing(job: JobConfig) -> None:
    from flows.pipeline import pipeline

    run = pipeline(job)
    out = job.out
    for name in (
        "meta_cap_dd.json",
        "meta_lat.json",
        "model/last.safetensors",
        "run.json",
        "report.html",
        "lineage.html",
    ):
        assert (out / name).is_file(), name
    assert list(out.glob("tensorboard/**/events.out.tfevents.*")) and list(out.glob("samples/*.png"))
    metadata = json.loads((out / "meta_lat.json").read_text())
    assert all((out / "latents" / f"{key}.npz").is_file() for key in metadata)

    record = json.loads((out / "run.json").read_text())
    latents, merged = record["stages"]["cache-latents"]["result"], record["stages"]["merge-tags"]["result"]
    assert latents["num_kept"] + latents["num_rejected"] == latents["num_seen"] == merged["num_kept"]
    assert latents["num_kept"] == len(metadata)
    subset = record["stages"]["subset"]["result"]
    assert subset["num_seen"] == 51 == subset["num_kept"] + subset["num_unmatched"] + subset["num_rejected"]
    reasons = {row.key: row.reason for row in read_rejected(out / "rejected.jsonl")}
    assert reasons == {"zz_no_text": "no_caption", "zz_cut": "undecodable", "zz_small": "too_small"}

    assert latents["parents"] == [merged["sha256"]] and merged["sha256"] == sha256_file(out / "meta_cap_dd.json")
    assert record["stages"]["train"]["result"]["parents"], "a result names what it was made from"

    shown = artifacts(
        "run-report", "run-lineage", "train-checkpoint", "latents-shards", "latents-buckets", "latents-summary"
    )
    shards = json.loads(shown["latents-shards"])
    assert sum(shard["kept"] for shard in shards) == latents["num_kept"]
    assert all(shard["state"] == "Completed" and shard["images/s"] > 0 for shard in shards)
    assert {shard["bound by"] for shard in shards} <= {"read", "decode", "transfer", "vae", "write"}
    assert {shard["device"] for shard in shards} == {"cpu"}
    assert all(f"| {bucket} | {number} |" in shown["latents-buckets"] for bucket, number in latents["buckets"].items())
    assert "| undecodable | 1 |" in shown["latents-summary"] and "| too_small | 1 |" in shown["latents-summary"]
    assert shown["run-report"].count("](data:image/jpeg;base64,") == 1 and "38 of 51" in shown["run-report"]
    assert (
        "scenery -night" in shown["run-lineage"]
        and record["stages"]["train"]["result"]["file"]["sha256"] in (shown["run-lineage"])
    )
    assert (
        "| `last.safetensors` |" in shown["train-checkpoint"]
        and f"tensorboard --logdir {out}/" in shown["train-checkpoint"]
    )
    assert "\nstep 4: `" in shown["train-checkpoint"], "each preview with its step and prompt"
    assert shown["train-checkpoint"].count("](data:image/jpeg;base64,") == len(list(out.glob("samples/*.png")))

    before = files_below(out)
    assert pipeline(job) == run
    assert files_below(out) == before
    states = task_states("cache-latents", num_tasks=len(shards) + 2)
    assert states["encode-shard: Cached"] > 0 and states["encode-shard: Completed"] == 0


def test_a_cached_shard_whose_latents_are_gone_is_redone(job: JobConfig) -> None:
    from flows.cache_latents import cache_latents

    config = job.latents_config(picked_by(job))
    latents = job.out / "latents"
    victim = sorted(latents.glob("*.npz"))[0]
    whole = victim.read_bytes()
    victim.unlink()
    cache_latents(config)
    assert victim.read_bytes() == whole
    num_shards = len(json.loads(artifacts("latents-shards")["latents-shards"]))
    assert task_states("cache-latents", num_tasks=num_shards + 2)["encode-shard: Completed"] == 1


def test_a_stage_command_continues_what_a_flow_made_and_the_other_way_round(job: JobConfig) -> None:
    from flows.cache_latents import cache_latents as flow
    from sdxl_core.latents.cache import cache_latents as core
    from sdxl_core.merge.plan import merge_tags
    from sdxl_core.training.launch import launch_training

    picked = picked_by(job)
    config = job.latents_config(picked)
    before = files_below(job.out)
    assert merge_tags(job.merge_config(picked)).num_kept == 38
    ref = core(config)
    assert launch_training(job.train_config()).num_steps == 4
    assert files_below(job.out) == before, "the commands redid what the flow had finished"
    victim = next((job.out / "latents").glob("*.npz"))
    victim.unlink()
    assert core(config) == ref
    between = files_below(job.out)
    assert flow(config) == ref
    assert files_below(job.out) == between, "the flow redid what the command had finished"


def test_a_killed_slot_costs_a_retry_not_the_run(
    pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from flows.cache_latents import cache_latents
    from flows.merge_tags import merge_tags
    from tasks.latents import encode_shard

    monkeypatch.setattr(encode_shard, "retry_delay_seconds", [0.1, 0.1, 0.1])
    merge_tags(MergeTagsConfig(source=pictures, out=tmp_path / "meta_cap_dd.json"))
    config = CacheLatentsConfig(
        source=pictures, metadata=tmp_path / "meta_cap_dd.json", out=tmp_path, vae="tiny", resolution_px=128,
        min_bucket_px=64, max_bucket_px=256, shard_size=25, commit_size=4, devices="cpu",
    )  # fmt: skip
    killed: list[int] = []
    run_in_slot = Slot.run

    def run_and_kill_once(slot: Slot, function: Any, *arguments: Any) -> Any:
        if killed:
            return run_in_slot(slot, function, *arguments)
        killed.append(run_in_slot(slot, os.getpid))
        killer = threading.Thread(target=kill_when_committed, args=killed)
        killer.start()
        try:
            return run_in_slot(slot, function, *arguments)
        finally:
            killer.join(timeout=60)

    def kill_when_committed(pid: int) -> None:
        while not any((tmp_path / "latents").glob("*.npz")):
            time.sleep(0.01)
        os.kill(pid, signal.SIGKILL)

    monkeypatch.setattr(Slot, "run", run_and_kill_once)
    ref = cache_latents(config)
    assert killed and ref.num_kept == 48 and ref.num_rejected == 2
    assert len(list((tmp_path / "latents").glob("*.npz"))) == 48


def test_a_mistake_is_told_once_and_not_retried(pictures: Path, tmp_path: Path) -> None:
    from flows.merge_tags import merge_tags

    with pytest.raises(ConfigError, match="nowhere"):
        merge_tags(MergeTagsConfig(source=pictures / "nowhere", out=tmp_path / "m.json"))
    assert task_states("merge-tags", num_tasks=1) == {"plan-merge: Failed": 1}
