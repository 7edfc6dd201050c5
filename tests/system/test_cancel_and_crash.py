"""Runs that are cancelled or die: nothing goes on in the background, and the next attempt finishes the work."""

import os
import signal
import time
from pathlib import Path
from typing import Any
from uuid import UUID

import pytest
from prefect.client.schemas.objects import State
from prefect.states import Cancelling, Crashed, Scheduled
from support.service import Service, wait_until

from sdxl_core.config import CacheLatentsConfig, MergeTagsConfig, TrainConfig
from sdxl_core.demo import draw_samples
from sdxl_core.latents.cache import cache_latents
from sdxl_core.merge.plan import merge_tags

pytestmark = pytest.mark.system
CANCELLED_WITHIN_S = 10


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("collection") / "pictures"
    draw_samples(folder)
    return folder


def latents_config(pictures: Path, out: Path) -> CacheLatentsConfig:
    """Enough work for half a minute on two slots, committed every four pictures."""
    merge_tags(MergeTagsConfig(source=pictures, out=out / "meta_cap_dd.json"))
    return CacheLatentsConfig(
        source=pictures, metadata=out / "meta_cap_dd.json", out=out, resolution_px=768, shard_size=25, commit_size=4,
        devices="cpu,cpu",
    )  # fmt: skip


def parameters(config: Any) -> dict[str, Any]:
    return {"config": config.model_dump(mode="json", exclude_defaults=True)}


def processes_of(run: UUID) -> set[int]:
    """The flow's process, and the slots and trainers that it started."""
    found = set()
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit() and int(entry.name) != os.getpid():
            try:
                is_of_run = str(run).encode() in (entry / "environ").read_bytes()
                if is_of_run and (entry / "stat").read_text().rpartition(")")[2].split()[0] != "Z":
                    found.add(int(entry.name))
            except (FileNotFoundError, PermissionError, ProcessLookupError):
                continue
    return found


def flow_process_of(run: UUID) -> int:
    """The process that Prefect's engine runs the flow in."""
    commands = {pid: Path(f"/proc/{pid}/cmdline").read_bytes() for pid in processes_of(run)}
    return next(pid for pid, command in commands.items() if b"prefect.engine" in command or b"flow_engine" in command)


def latents_of(out: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in (out / "latents").glob("*.npz")}


def begun(out: Path) -> int:
    """How many latents are committed."""
    return len(list((out / "latents").glob("*.npz")))


def states_of(service: Service, run: UUID) -> list[State]:
    with service.client() as client:
        return sorted(client.read_flow_run_states(run), key=lambda state: state.timestamp)


def cancel(service: Service, run: UUID) -> float:
    """Cancel through the API, as the browser does. Returns the seconds until no process of the run is left."""
    assert len(processes_of(run)) >= 2, "neither slots nor trainer at work"
    started = time.monotonic()
    with service.client() as client:
        client.set_flow_run_state(run, Cancelling())
    wait_until(lambda: not processes_of(run), timeout_s=60, what="end of the run's processes")
    seconds = time.monotonic() - started
    service.wait_for(run, "Cancelled")
    return seconds


def test_cancelling_ends_the_slots_and_keeps_what_they_committed(
    service: Service, pictures: Path, tmp_path: Path
) -> None:
    config = latents_config(pictures, tmp_path)
    run = service.submit("cache-latents/cache-latents", parameters(config))
    wait_until(lambda: begun(tmp_path), timeout_s=120, what="first latents")
    assert cancel(service, run) < CANCELLED_WITHIN_S
    kept = {path.name: path.stat().st_mtime_ns for path in (tmp_path / "latents").glob("*.npz")}
    assert 0 < len(kept) < 48
    service.wait_for(service.submit("cache-latents/cache-latents", parameters(config)), "Completed", timeout_s=240)
    now = {path.name: path.stat().st_mtime_ns for path in (tmp_path / "latents").glob("*.npz")}
    redone = [name for name, time_ns in kept.items() if now[name] != time_ns]
    assert len(now) == 48 and len(redone) <= 2 * config.commit_size, redone


def test_cancelling_ends_the_trainer_which_saves_its_state(service: Service, pictures: Path, tmp_path: Path) -> None:
    small = {"resolution_px": 128, "min_bucket_px": 64, "max_bucket_px": 256, "devices": "cpu"}
    cache_latents(latents_config(pictures, tmp_path).model_copy(update=small))
    config = TrainConfig(
        metadata=tmp_path / "meta_lat.json", latents=tmp_path / "latents", out=tmp_path, max_train_steps=5000,
        use_cpu=True,
    )  # fmt: skip
    run = service.submit("finetune/finetune", parameters(config))
    wait_until((tmp_path / "state" / "progress.json").exists, timeout_s=120, what="first step")
    assert cancel(service, run) < CANCELLED_WITHIN_S
    states = [path for path in (tmp_path / "state").iterdir() if path.is_dir() and path.name.startswith("step")]
    assert states, sorted(path.name for path in (tmp_path / "state").iterdir())


def test_one_death_that_is_reported_twice_is_resumed_once(service: Service, pictures: Path, tmp_path: Path) -> None:
    (tmp_path / "undisturbed").mkdir()
    config = latents_config(pictures, tmp_path / "run")
    run = service.submit("cache-latents/cache-latents", parameters(config))
    wait_until(lambda: begun(tmp_path / "run"), timeout_s=120, what="first latents")
    os.kill(flow_process_of(run), signal.SIGKILL)
    service.wait_for(run, "Crashed", timeout_s=30)
    time.sleep(3)
    with service.client() as client:
        client.set_flow_run_state(run, Crashed(message="the second report of one death"), force=True)
    wait_until(
        lambda: [state for state in states_of(service, run) if state.name == "AwaitingRetry"],
        timeout_s=90, what="the resume",
    )  # fmt: skip
    wait_until(
        lambda: [state.name for state in states_of(service, run)].count("Running") == 2,
        timeout_s=60, what="the second attempt",
    )  # fmt: skip
    with service.client() as client:  # and a third attempt beside it, as when the resume itself comes twice
        client.set_flow_run_state(run, Scheduled(), force=True)
    wait_until(lambda: (tmp_path / "run" / "meta_lat.json").exists(), timeout_s=240, what="the end of the work")
    service.wait_for(run, "Completed")
    names = [state.name for state in states_of(service, run)]
    assert names.count("Crashed") == 2 and names.count("AwaitingRetry") == 1, names
    undisturbed = latents_config(pictures, tmp_path / "undisturbed")
    cache_latents(undisturbed)
    assert latents_of(tmp_path / "run") == latents_of(tmp_path / "undisturbed")
