"""`sdxl-flows up`: a real server and worker, started, used, hurt and ended."""

import base64
import json
import os
import re
import signal
import socket
import subprocess
import sys
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import pytest
from support.run_processes import in_role, listening
from support.service import ROOT, Service, wait_until

pytestmark = pytest.mark.system


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    (tmp_path / "in").mkdir()
    for number in range(3):
        (tmp_path / "in" / f"{number}.png").write_bytes(b"never opened by merging")
        (tmp_path / "in" / f"{number}.txt").write_text(f"tag {number}")
    return tmp_path / "in"


@contextmanager
def started_here(service: Service, *options: str) -> Iterator[subprocess.Popen[bytes]]:
    """`sdxl-flows up`, as in a terminal; what it says is in up.txt of the service's folder."""
    command = [sys.executable, "-m", "sdxl_core.cli", "up", *options]
    hears_ctrl_c = partial(signal.signal, signal.SIGINT, signal.SIG_DFL)  # tests in a shell's background do not
    with (
        open(service.folder / "up.txt", "wb") as said,
        subprocess.Popen(
            command, cwd=ROOT, env=service.environment, stdout=said, stderr=said, start_new_session=True,
            preexec_fn=hears_ctrl_c,
        ) as supervisor,
    ):  # fmt: skip
        try:
            yield supervisor
        finally:
            supervisor.terminate()


def merge_through_the_server(service: Service, source: Path, out: Path) -> subprocess.CompletedProcess[str]:
    parameters = f'{{"config": {{"source": "{source}", "out": "{out}"}}}}'
    return service.prefect(
        "deployment", "run", "merge-tags/merge-tags", "--params", parameters, "--watch", "--watch-interval", "1"
    )


def test_status_tells_what_runs_and_a_second_up_is_refused(service: Service) -> None:
    wait_until(lambda: "online" in service.command("status").stdout, timeout_s=180, what="the worker's first sign")
    status = service.command("status")
    assert status.returncode == 0 and "server answers" in status.stdout and "online, last heard of " in status.stdout
    assert f"logs: {service.folder / 'home'}/*.log" in status.stdout
    assert f"curves: http://127.0.0.1:{service.curves_port}" in status.stdout
    again = service.command("up", "--port", str(service.port))
    assert again.returncode == 2 and "it runs already" in again.stderr
    assert listening(service.processes()) == {"127.0.0.1"}
    assert (service.folder / "prefect" / "prefect.db").exists()


def test_every_flow_is_deployed_and_a_misspelt_parameter_is_refused_at_submit(service: Service) -> None:
    listed = service.prefect("deployment", "ls").stdout
    assert all(name in listed for name in ("pipeline/", "subset/", "merge-tags/", "cache-latents/", "finetune/"))
    refused = service.prefect(
        "deployment", "run", "merge-tags/merge-tags", "--params", '{"config": {"source": "a", "out": "b", "shards": 3}}'
    )
    assert refused.returncode != 0 and "shards" in refused.stdout + refused.stderr


def test_a_run_from_the_server_does_the_work(service: Service, pictures: Path, tmp_path: Path) -> None:
    done = merge_through_the_server(service, pictures, tmp_path / "m.json")
    assert done.returncode == 0, done.stdout + done.stderr
    assert (tmp_path / "m.json").exists()
    told = service.command("status").stdout.split("runs, newest first:\n")[1].splitlines()
    assert re.match(r"  \d{4}-\d\d-\d\d \d\d:\d\d  Completed +merge-tags  [a-z]+-[a-z]+$", told[0])


def test_a_killed_worker_comes_back(service: Service, pictures: Path, tmp_path: Path) -> None:
    workers = in_role("worker", set(service.processes()))
    assert workers
    for pid in workers:
        os.kill(pid, signal.SIGKILL)
    done = merge_through_the_server(service, pictures, tmp_path / "m.json")
    assert done.returncode == 0 and (tmp_path / "m.json").exists()


def test_a_port_in_use_is_told(tmp_path: Path) -> None:
    other = Service(tmp_path)
    with socket.socket() as holder:
        holder.bind(("127.0.0.1", 0))
        other.port = holder.getsockname()[1]
        holder.listen()
        refused = other.command("up", "--port", str(other.port))
    assert refused.returncode == 2 and "cannot be used" in refused.stderr and "--port" in refused.stderr


def test_exposing_the_server_without_a_password_is_refused(tmp_path: Path) -> None:
    other = Service(tmp_path)
    exposed = ("up", "--host", "0.0.0.0", "--port", str(other.port))
    refused = other.command(*exposed)
    assert refused.returncode == 2 and "would let anyone on the network" in refused.stderr
    locked_out = other.command(*exposed, changed={"PREFECT_SERVER_API_AUTH_STRING": "user:word"})
    assert locked_out.returncode == 2 and "the worker would not be let in" in locked_out.stderr


def test_server_and_worker_end_with_a_supervisor_that_is_killed(tmp_path: Path) -> None:
    other = Service(tmp_path)
    with started_here(other, "--port", str(other.port), "--tensorboard-port", "0") as supervisor:
        wait_until(lambda: in_role("server", set(other.processes())), timeout_s=180, what="the server's process")
        supervisor.kill()
        wait_until(lambda: not other.processes(), timeout_s=120, what="end of everything")
    status = other.command("status")
    assert status.returncode == 1 and "not running" in status.stdout
    assert [other.command("down").stdout.strip() for _ in range(2)] == ["nothing is running."] * 2


def test_an_exposed_server_answers_whoever_has_the_password(tmp_path: Path) -> None:
    other = Service(tmp_path)
    password = {"PREFECT_SERVER_API_AUTH_STRING": "user:word", "PREFECT_API_AUTH_STRING": "user:word"}
    other.environment |= password

    def answer(user: str) -> int:
        address = f"http://127.0.0.1:{other.port}/api/flow_runs/count"
        request = urllib.request.Request(address, b"{}", {"Content-Type": "application/json"})
        if user:
            request.add_header("Authorization", f"Basic {base64.b64encode(user.encode()).decode()}")
        try:
            with urllib.request.urlopen(request, timeout=30) as response:
                return int(response.status)
        except urllib.error.HTTPError as error:
            with error:
                return error.code

    ports = ("--port", str(other.port), "--tensorboard-port", "0")
    with started_here(other, "--host", "0.0.0.0", *ports) as supervisor:
        wait_until(lambda: "online" in other.command("status").stdout, timeout_s=180, what="the worker")
        assert (answer(""), answer("user:guess"), answer("user:word")) == (401, 401, 200)
        unknown = {"PREFECT_API_AUTH_STRING": "user:guess"}
        asked = other.command("status", changed=unknown)
        assert asked.returncode == 2 and "asks for a password" in asked.stderr and "Traceback" not in asked.stderr
        with urllib.request.urlopen(f"http://127.0.0.1:{other.port}/ui-settings", timeout=30) as told:
            assert json.load(told)["api_url"] == "/api", "the page asks the host that it came from"
        os.killpg(supervisor.pid, signal.SIGINT)  # Ctrl-C
        assert supervisor.wait(timeout=120) == 0 and not other.processes()
    said = (tmp_path / "up.txt").read_text()
    assert "ended: server and worker are down" in said and "http://0.0.0.0" not in said
    assert f"open http://127.0.0.1:{other.port}/deployments; from elsewhere: http://" in said
