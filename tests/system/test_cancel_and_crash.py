"""Runs that are cancelled, or whose death is told twice: nothing goes on behind, and the work is finished once."""

import os
import signal
import time
from pathlib import Path

import pytest
from prefect.states import Crashed, Scheduled
from support.service import Service, wait_until
from support.system_runs import (
    CANCELLED_WITHIN_S,
    begun,
    cancel,
    latents_config,
    latents_of,
    names_of,
    num_resumes,
    parameters,
    role_of,
)

pytestmark = pytest.mark.system


def test_cancelling_ends_the_slots_and_keeps_what_they_committed(
    service: Service, pictures: Path, tmp_path: Path
) -> None:
    config = latents_config(pictures, tmp_path)
    run = service.submit("cache-latents/cache-latents", parameters(config))
    wait_until(lambda: begun(tmp_path), timeout_s=240, what="first latents")
    assert cancel(service, run) < CANCELLED_WITHIN_S
    kept = {path.name: path.stat().st_mtime_ns for path in (tmp_path / "latents").glob("*.npz")}
    assert 0 < len(kept) < 48
    service.wait_for(service.submit("cache-latents/cache-latents", parameters(config)), "Completed", timeout_s=240)
    now = {path.name: path.stat().st_mtime_ns for path in (tmp_path / "latents").glob("*.npz")}
    redone = [name for name, time_ns in kept.items() if now[name] != time_ns]
    assert len(now) == 48 and len(redone) <= 2 * config.commit_size, redone


def test_one_death_that_is_reported_twice_is_resumed_once(
    service: Service, pictures: Path, encoded: dict[str, bytes], tmp_path: Path
) -> None:
    run = service.submit("cache-latents/cache-latents", parameters(latents_config(pictures, tmp_path)))
    wait_until(lambda: begun(tmp_path), timeout_s=240, what="first latents")
    os.kill(min(role_of(run, "flow")), signal.SIGKILL)
    service.wait_for(run, "Crashed", timeout_s=120)
    time.sleep(3)
    with service.client() as client:
        client.set_flow_run_state(run, Crashed(message="the second report of one death"), force=True)
    wait_until(lambda: "AwaitingRetry" in names_of(service, run), timeout_s=90, what="the resume")
    wait_until(lambda: names_of(service, run).count("Running") == 2, timeout_s=180, what="the second attempt")
    with service.client() as client:  # and a third attempt beside it, as when the resume itself comes twice
        client.set_flow_run_state(run, Scheduled(), force=True)
    wait_until(lambda: (tmp_path / "meta_lat.json").exists(), timeout_s=240, what="the end of the work")
    service.wait_for(run, "Completed")
    names = names_of(service, run)
    assert names.count("Crashed") == 2 and num_resumes(service, run) == 1, names
    assert names.count("Running") == 3, names
    assert latents_of(tmp_path) == encoded
