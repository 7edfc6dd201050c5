"""The core of it on PostgreSQL: up by its address, a run that crashes and comes back, a run that is cancelled."""

import asyncio
import os
import signal
import subprocess
from pathlib import Path
from typing import Any

import pytest
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


@pytest.fixture
def service(postgres_service: Service) -> Service:
    return postgres_service


def ask(url: str, query: str) -> Any:
    import asyncpg

    async def value() -> Any:
        connection = await asyncpg.connect(url)
        try:
            return await connection.fetchval(query)
        finally:
            await connection.close()

    return asyncio.run(value())


def test_a_run_that_crashes_is_finished_and_kept_in_postgresql(
    service: Service, pictures: Path, encoded: dict[str, bytes], tmp_path: Path
) -> None:
    assert "server answers" in service.command("status").stdout
    run = service.submit("cache-latents/cache-latents", parameters(latents_config(pictures, tmp_path)))
    wait_until(lambda: begun(tmp_path), timeout_s=240, what="first latents")
    os.kill(min(role_of(run, "flow")), signal.SIGKILL)
    service.wait_for(run, "Crashed", timeout_s=120)
    service.wait_for(run, "Completed", timeout_s=600)
    assert num_resumes(service, run) == 1, names_of(service, run)
    assert latents_of(tmp_path) == encoded
    assert ask(service.database_url, f"select state_name from flow_run where id = '{run}'") == "Completed"
    assert not (service.folder / "prefect" / "prefect.db").exists()


def test_cancelling_ends_a_run_within_ten_seconds(service: Service, pictures: Path, tmp_path: Path) -> None:
    run = service.submit("cache-latents/cache-latents", parameters(latents_config(pictures, tmp_path)))
    wait_until(lambda: begun(tmp_path), timeout_s=240, what="first latents")
    assert cancel(service, run) < CANCELLED_WITHIN_S
    assert 0 < begun(tmp_path) < 48


def test_another_database_is_refused(tmp_path: Path) -> None:
    other = Service(tmp_path)
    refused: subprocess.CompletedProcess[str] = other.command(
        "up", "--port", str(other.port), "--database-url", "mysql://root@localhost/prefect"
    )
    assert refused.returncode == 2 and "mysql" in refused.stderr and "postgresql://" in refused.stderr
