"""A run on a Ray of its own is cancelled: nothing of Ray is left, and the next run goes on where it was."""

from pathlib import Path

import pytest
from support.service import Service, wait_until
from support.system_runs import CANCELLED_WITHIN_S, cancel, latents_config, parameters, task_runs_of

from sdxl_core.latents.ledger import SUMMARY
from sdxl_core.latents.rows import LEDGER_FOLDER

pytestmark = pytest.mark.system


def test_a_cancelled_run_on_ray_is_gone_within_ten_seconds_and_finished_by_the_next(
    service: Service, pictures: Path, tmp_path: Path
) -> None:
    config = latents_config(pictures, tmp_path, shard_size=8, engine="ray")
    run = service.submit("cache-latents/cache-latents", parameters(config))
    wait_until(lambda: num_finished(tmp_path), timeout_s=300, what="the first finished shard")
    assert cancel(service, run) < CANCELLED_WITHIN_S  # until no process of it is left, Ray's own included
    kept = {path.name: path.stat().st_mtime_ns for path in (tmp_path / "latents").glob("*.npz")}
    finished = num_finished(tmp_path)
    assert finished < 7, "it was too quick to be cancelled"

    again = service.submit("cache-latents/cache-latents", parameters(config))
    service.wait_for(again, "Completed", timeout_s=400)
    states = [task.state_name for task in task_runs_of(service, again, 9) if task.name.startswith("encode-shard")]
    assert len(states) == 7 and 1 <= states.count("Cached") <= finished, states
    now = {path.name: path.stat().st_mtime_ns for path in (tmp_path / "latents").glob("*.npz")}
    redone = [name for name, time_ns in kept.items() if now[name] != time_ns]
    assert len(now) == 48 and len(redone) <= 2 * config.commit_size, redone


def num_finished(out: Path) -> int:
    """Shards whose ledger is closed."""
    return len(list((out / "latents" / LEDGER_FOLDER).glob(f"*{SUMMARY}")))
