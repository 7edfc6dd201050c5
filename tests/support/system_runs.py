"""Runs on a real service: what they are asked to do, what they leave, and how they are cancelled."""

import os
import signal
import time
from itertools import groupby
from pathlib import Path
from typing import Any
from uuid import UUID

from support.run_processes import in_role, processes_of
from support.service import Service, wait_until

from sdxl_core.config import CacheLatentsConfig, MergeTagsConfig
from sdxl_core.merge.plan import merge_tags

CANCELLED_WITHIN_S = 30  # 10 are asked for, and measured (benchmarks/cancel.py); a busy machine may take longer
SMALL = {"vae": "tiny", "resolution_px": 128, "min_bucket_px": 64, "max_bucket_px": 256, "devices": "cpu"}


def latents_config(pictures: Path, out: Path, **changed: Any) -> CacheLatentsConfig:
    """Enough work to be disturbed at on two slots, committed every four pictures."""
    merge_tags(MergeTagsConfig(source=pictures, out=out / "meta_cap_dd.json"))
    options = {"vae": "tiny", "resolution_px": 640, "shard_size": 25, "commit_size": 4, "devices": "cpu,cpu"} | changed
    return CacheLatentsConfig.model_validate(
        {"source": pictures, "metadata": out / "meta_cap_dd.json", "out": out} | options
    )


def parameters(config: Any) -> dict[str, Any]:
    return {"config": config.model_dump(mode="json", exclude_defaults=True)}


def submitted_run(service: Service, deployment: UUID, section: str, asked: dict[str, Any]) -> UUID:
    """The run of a deployment that was asked for this, among all that are there, once the server has it."""
    from prefect.client.schemas.filters import DeploymentFilter, DeploymentFilterId

    def look() -> UUID | None:
        with service.client() as client:
            runs = client.read_flow_runs(deployment_filter=DeploymentFilter(id=DeploymentFilterId(any_=[deployment])))
        return next((run.id for run in runs if asked.items() <= run.parameters.get(section, {}).items()), None)

    return wait_until(look, timeout_s=60, what="the run that the form started")


def latents_of(out: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in (out / "latents").glob("*.npz")}


def begun(out: Path) -> int:
    """How many latents are committed."""
    return len(list((out / "latents").glob("*.npz")))


def states_of(service: Service, run: UUID) -> list[Any]:
    with service.client() as client:
        return sorted(client.read_flow_run_states(run), key=lambda state: state.timestamp)


def names_of(service: Service, run: UUID) -> list[str]:
    return [state.name for state in states_of(service, run)]


def num_resumes(service: Service, run: UUID) -> int:
    """How often it was scheduled again after a crash. One resume may be told twice in a row, and is one attempt.

    The server fires an automation again where the event of its own action comes while it is still at it.
    """
    return sum(name == "AwaitingRetry" for name, _ in groupby(names_of(service, run)))


def task_runs_of(service: Service, run: UUID, num: int) -> list[Any]:
    """The task runs of a flow run, once the server has so many and all their ends: it learns of them seconds later."""
    from prefect.client.schemas.filters import FlowRunFilter

    def look() -> list[Any] | None:
        with service.client() as client:
            runs = client.read_task_runs(flow_run_filter=FlowRunFilter(id={"any_": [run]}))
        ended = [task for task in runs if task.state is not None and task.state.is_final()]
        return ended if len(ended) == num else None

    return wait_until(look, timeout_s=120, what=f"the ends of {num} task runs")


def task_states_of(service: Service, task_run: UUID) -> list[Any]:
    """In the order of time."""
    with service.client() as client:
        return sorted(client.read_task_run_states(task_run), key=lambda state: state.timestamp)


def failed_shards_of(service: Service, run: UUID) -> str:
    """The markdown that lists them."""
    from prefect.client.schemas.filters import ArtifactFilter, ArtifactFilterFlowRunId, ArtifactFilterKey

    wanted = ArtifactFilter(
        key=ArtifactFilterKey(any_=["failed-shards"]), flow_run_id=ArtifactFilterFlowRunId(any_=[run])
    )
    with service.client() as client:
        shown = client.read_artifacts(artifact_filter=wanted)
    assert len(shown) == 1
    return str(shown[0].data)


def role_of(run: UUID, role: str) -> set[int]:
    """The processes of a run that are its flow, its slots or its trainers."""
    return in_role(role, processes_of(run))


def cancel(service: Service, run: UUID) -> float:
    """Cancel through the API, as the browser does. Returns the seconds until no process of the run is left."""
    from prefect.states import Cancelling

    assert len(processes_of(run)) >= 2, "neither slots nor trainer at work"
    started = time.monotonic()
    with service.client() as client:
        client.set_flow_run_state(run, Cancelling())
    wait_until(lambda: not processes_of(run), timeout_s=120, what="end of the run's processes")
    seconds = time.monotonic() - started
    service.wait_for(run, "Cancelled")
    return seconds


def lose_runs(service: Service, folder: Path) -> tuple[UUID, UUID, UUID]:
    """Runs that are at work as far as the server knows, and have no process: two are resumed, the one between is not.

    The first two as a power cut leaves them; the last as its worker does, which is killed before it started the run.
    """
    from prefect.states import Pending, Running

    from flows.service.automations import expect_signs_of_life

    (folder / "a.png").write_bytes(b"never opened by merging")
    (folder / "a.txt").write_text("1girl")

    def lost(deployment: str, state: Any, **config: str) -> UUID:
        found = client.read_deployment_by_name(deployment).id
        run = client.create_flow_run_from_deployment(found, parameters={"config": config}, state=state)
        return UUID(str(run.id))

    def lost_merge(name: str, state: Any) -> UUID:
        return lost("merge-tags/merge-tags", state, source=str(folder), out=str(folder / name))

    with service.client() as client:
        resumed, left = (
            lost_merge("1.json", Running()),
            lost("verify-latents/verify-latents", Running(), path=str(folder)),
        )
        expect_signs_of_life(client)
        never_started = lost_merge("2.json", Pending())
    for pid in in_role("worker", set(service.processes())):
        os.kill(pid, signal.SIGKILL)
    return resumed, left, never_started
