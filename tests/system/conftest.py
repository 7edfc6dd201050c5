"""A real server and worker for all system tests that ask for them."""

import os
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from support.postgres import missing, postgres
from support.service import Service
from support.system_runs import latents_config, latents_of, lose_runs

from sdxl_core.demo import draw_samples
from sdxl_core.latents.cache import cache_latents


@pytest.fixture(scope="session")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    with running(tmp_path_factory.mktemp("service")) as service:
        service.lost_runs = lose_runs(service, tmp_path_factory.mktemp("lost"))
        yield service


@pytest.fixture(scope="module")
def postgres_service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    if missing():
        pytest.skip(missing())
    with postgres() as url, running(tmp_path_factory.mktemp("service"), "--database-url", url) as service:
        service.database_url = url
        yield service


@pytest.fixture(scope="session")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("collection") / "pictures"
    draw_samples(folder)
    return folder


@pytest.fixture(scope="session")
def encoded(pictures: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """What `latents_config` makes of the pictures when nobody disturbs it."""
    out = tmp_path_factory.mktemp("undisturbed")
    cache_latents(latents_config(pictures, out))
    return latents_of(out)


@contextmanager
def running(folder: Path, *options: str) -> Iterator[Service]:
    """`sdxl-flows up` in the folder, and the proof that nothing of it is left afterwards."""
    service = Service(folder)
    try:
        started = service.up(*options)
        assert started.returncode == 0, started.stdout + started.stderr
        assert f"running in the background: http://127.0.0.1:{service.port} " in started.stdout
        yield service
    finally:
        ended = service.command("down")
        deadline = time.monotonic() + 120
        while service.processes() and time.monotonic() < deadline:
            time.sleep(0.5)
        left = service.processes()
        for pid in left:
            os.kill(pid, signal.SIGKILL)
    assert "down" in ended.stdout and not left
