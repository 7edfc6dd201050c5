"""A real server and worker for all system tests that ask for them."""

import os
import signal
import time
from collections.abc import Iterator

import pytest
from support.service import Service


@pytest.fixture(scope="session")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    service = Service(tmp_path_factory.mktemp("service"))
    started = service.command("up", "--detach", "--port", str(service.port))
    try:
        assert started.returncode == 0, started.stdout + started.stderr
        yield service
    finally:
        ended = service.command("down")
        deadline = time.monotonic() + 30
        while service.processes() and time.monotonic() < deadline:
            time.sleep(0.5)
        left = service.processes()
        for pid in left:
            os.kill(pid, signal.SIGKILL)
    assert "down" in ended.stdout and not left
