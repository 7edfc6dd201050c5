"""Ctrl-C reaches the whole process group; a run ends all the same, and leaves nothing running."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

pytestmark = pytest.mark.system
ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGKILL])
def test_a_run_that_is_interrupted_ends_with_its_server(tmp_path: Path, number: signal.Signals) -> None:
    environment = os.environ | {"PREFECT_HOME": str(tmp_path / "prefect"), "PREFECT_API_URL": "", "MARK": str(tmp_path)}
    log = tmp_path / "log.txt"
    with open(log, "wb") as output:
        run = subprocess.Popen(
            [sys.executable, "-m", "sdxl_core.cli", "demo", "--out", str(tmp_path / "out")],
            cwd=ROOT, env=environment, stdout=output, stderr=subprocess.STDOUT, start_new_session=True,
        )  # fmt: skip
        deadline = time.monotonic() + 600
        while "encode-shard" not in log.read_text() and run.poll() is None and time.monotonic() < deadline:
            time.sleep(0.2)
        os.killpg(run.pid, number)
        status = run.wait(timeout=120)
    assert status == (130 if number == signal.SIGINT else -signal.SIGKILL), log.read_text()[-2000:]
    if number == signal.SIGINT:
        assert "interrupted: what was finished is kept" in log.read_text()
    deadline = time.monotonic() + 120
    while left_running(tmp_path) and time.monotonic() < deadline:
        time.sleep(0.5)
    assert left_running(tmp_path) == []


def left_running(mark: Path) -> list[str]:
    """Command lines of the processes that were started for this test."""
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        try:
            if f"MARK={mark}".encode() in (process / "environ").read_bytes().split(b"\0"):
                found.append((process / "cmdline").read_bytes().replace(b"\0", b" ").decode())
        except OSError:
            continue
    return found
