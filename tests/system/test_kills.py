"""What is killed while a run is at work is replaced, and the run ends with the bytes of an undisturbed one.

The flow's own process: test_cancel_and_crash.py. Worker and flow together, at random moments: benchmarks/chaos.md.
"""

import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any
from uuid import UUID

import pytest
from support.run_processes import in_role
from support.service import Service, wait_until
from support.system_runs import (
    CANCELLED_WITHIN_S,
    SMALL,
    begun,
    cancel,
    latents_config,
    latents_of,
    names_of,
    parameters,
    role_of,
    task_states_of,
)

from sdxl_core.config import TrainConfig
from sdxl_core.latents.cache import cache_latents
from sdxl_core.training.launch import launch_training

pytestmark = pytest.mark.system
NUM_STEPS = 80


def kill(pids: set[int]) -> None:
    assert pids
    for pid in pids:
        os.kill(pid, signal.SIGKILL)


def replaced(pids: Callable[[], set[int]], killed: set[int], *, what: str) -> None:
    wait_until(lambda: pids() - killed, timeout_s=120, what=f"a new {what}")


def test_a_slot_and_then_the_server_die_and_the_run_goes_on(
    service: Service, pictures: Path, encoded: dict[str, bytes], tmp_path: Path
) -> None:
    run = service.submit("cache-latents/cache-latents", parameters(latents_config(pictures, tmp_path)))
    wait_until(lambda: begun(tmp_path), timeout_s=240, what="first latents")
    slot = {min(role_of(run, "slot"))}
    kill(slot)
    replaced(lambda: role_of(run, "slot"), role_of(run, "slot") | slot, what="slot")
    server = in_role("server", set(service.processes()))
    kill(server)
    replaced(lambda: in_role("server", set(service.processes())), server, what="server")
    wait_until(lambda: (tmp_path / "meta_lat.json").exists(), timeout_s=240, what="the end of the work")
    wait_until(service.answers, timeout_s=120, what="the server's answer")
    service.wait_for(run, "Completed")
    assert names_of(service, run).count("Running") == 1  # it was never started again
    assert latents_of(tmp_path) == encoded


def test_the_worker_dies_and_its_run_is_finished(
    service: Service, pictures: Path, encoded: dict[str, bytes], tmp_path: Path
) -> None:
    run = service.submit("cache-latents/cache-latents", parameters(latents_config(pictures, tmp_path)))
    wait_until(lambda: begun(tmp_path), timeout_s=240, what="first latents")
    worker = in_role("worker", set(service.processes()))
    kill(worker)
    replaced(lambda: in_role("worker", set(service.processes())), worker, what="worker")
    service.wait_for(run, "Completed", timeout_s=600)
    assert latents_of(tmp_path) == encoded


@pytest.fixture(scope="module")
def latents(pictures: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("latents")
    cache_latents(latents_config(pictures, out, **SMALL))
    return out


@pytest.fixture
def to_train(latents: Path) -> Callable[[Path], TrainConfig]:
    def config(out: Path) -> TrainConfig:
        return TrainConfig(
            metadata=latents / "meta_lat.json", latents=latents / "latents", out=out, max_train_steps=NUM_STEPS,
            save_every_steps=5, shuffle_caption=True, caption_dropout_rate=0.1, learning_rate=1e-4, use_cpu=True,
        )  # fmt: skip

    return config


def saved(out: Path) -> list[str]:
    """States of the training that are on disk."""
    return [path.name for path in (out / "state").glob("step-*") if path.is_dir()]


def tensors_of(out: Path) -> bytes:
    """The checkpoint without its header, which tells where and when it was made."""
    data = (out / "model" / "last.safetensors").read_bytes()
    return data[8 + int.from_bytes(data[:8], "little") :]


def pause_before_the_retry_s(service: Service, run: UUID) -> float:
    """Between the task's failure and its next start, as Prefect planned it."""
    from prefect.client.schemas.filters import FlowRunFilter

    def look() -> list[Any] | None:
        with service.client() as client:
            tasks = client.read_task_runs(flow_run_filter=FlowRunFilter(id={"any_": [run]}))
        states = task_states_of(service, tasks[0].id) if tasks else []
        return states if "Retrying" in [state.name for state in states] else None

    states = {state.name: state.timestamp for state in wait_until(look, timeout_s=60, what="a retry")}
    return float((states["Retrying"] - states["AwaitingRetry"]).total_seconds())


def test_a_killed_and_a_cancelled_trainer_end_with_the_weights_of_an_undisturbed_one(
    service: Service, to_train: Callable[[Path], TrainConfig], tmp_path: Path
) -> None:
    """Both on one run: the trainer is killed, the task tries again; then the run is cancelled, and submitted anew."""
    config = to_train(tmp_path / "run")
    run = service.submit("finetune/finetune", parameters(config))
    progress = config.out / "state" / "progress.json"
    wait_until(progress.exists, timeout_s=240, what="first step")
    killed = role_of(run, "trainer")
    kill(killed)
    wait_until(lambda: not progress.exists(), timeout_s=180, what="the next attempt")
    wait_until(progress.exists, timeout_s=240, what="its first step")
    assert role_of(run, "trainer").isdisjoint(killed)
    wait_until(lambda: saved(config.out), timeout_s=120, what="a saved state")
    assert cancel(service, run) < CANCELLED_WITHIN_S
    assert not (config.out / "model" / "last.safetensors").exists(), "it was too quick to be cancelled"
    assert (
        5 * 0.75 <= pause_before_the_retry_s(service, run) < 15
    )  # jitter, and a busy machine; the next one would be 15 at least
    names = saved(config.out)
    again = service.submit("finetune/finetune", parameters(config))
    service.wait_for(again, "Completed", timeout_s=400)
    wait_until(lambda: any(name.startswith("run-") for name in service.runs_with_curves()), timeout_s=60, what="curves")
    assert f"steps {max(names)[5:].lstrip('0')} to {NUM_STEPS} on" in (config.out / "train.log").read_text()
    assert tensors_of(config.out) == tensors_of(
        launch_training(to_train(tmp_path / "undisturbed")).file.path.parents[1]
    )
