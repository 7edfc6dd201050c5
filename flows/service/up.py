"""Start the server, deploy every flow, keep a worker alive, and end all of it together."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

from prefect.client.orchestration import get_client
from prefect.settings import PREFECT_API_URL, temporary_settings

from flows.service.deploy import POOL, ROOT, deploy, is_healthy
from flows.service.record import read_record, remove_record, service_folder, write_record
from sdxl_core.errors import ConfigError, SdxlFlowsError
from sdxl_core.processes import end_group

START_TIMEOUT_S = 180.0
WORKER_GRACE_S = 20.0
LOOPBACK = ("127.0.0.1", "localhost", "::1")


def up(*, host: str, port: int, detach: bool) -> None:
    """Run the service until Ctrl-C, or leave it running (`detach`).

    Raises: ConfigError: it runs already, the port is taken, or the host would expose it without a password.
    """
    running = read_record()
    if running is not None:
        raise ConfigError(f"it runs already: {running.url} (process {running.pid}). `sdxl-flows down` ends it.")
    if host not in LOOPBACK and not os.environ.get("PREFECT_SERVER_API_AUTH_STRING"):
        raise ConfigError(
            f"--host {host} would let anyone on the network start jobs here. Set PREFECT_SERVER_API_AUTH_STRING and "
            f"PREFECT_API_AUTH_STRING to 'user:password' first, or keep 127.0.0.1 and use an SSH tunnel."
        )
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError as error:
            raise ConfigError(
                f"port {port} on {host} cannot be used: {error.strerror}. Choose another --port."
            ) from error
    if detach:
        _detach(host, port)
    else:
        _supervise(host, port)


def _detach(host: str, port: int) -> None:
    command = [sys.executable, "-m", "sdxl_core.cli", "up", "--host", host, "--port", str(port)]
    log = service_folder() / "up.log"
    log.parent.mkdir(parents=True, exist_ok=True)
    with open(log, "wb") as output:
        child = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=output, stderr=output, start_new_session=True
        )
    while child.poll() is None:
        record = read_record()
        if record is not None and record.ready:
            print(f"running in the background: {record.url}   (sdxl-flows status, sdxl-flows down)")
            return
        time.sleep(0.5)
    raise SdxlFlowsError(f"the service did not start. Its last words:\n{_tail(log)}")


def _supervise(host: str, port: int) -> None:
    url = f"http://{host}:{port}"
    environment = os.environ | {"PREFECT_API_URL": f"{url}/api", "PREFECT_UI_API_URL": f"{url}/api"}
    signal.signal(signal.SIGTERM, _interrupt)
    write_record(url=url, ready=False)
    server_command = ["-m", "prefect", "server", "start", "--host", host, "--port", str(port)]
    worker_command = [
        "-m",
        "prefect",
        "worker",
        "start",
        "--pool",
        POOL,
        "--type",
        "process",
        "--install-policy",
        "never",
    ]
    try:
        print(f"starting the Prefect server on {url} …", flush=True)
        with _child("server", server_command, environment) as server:
            _wait_healthy(url, server)
            print("deploying the flows …", flush=True)
            deploy(url, environment)
            print("starting a worker …", flush=True)
            with _child("worker", worker_command, environment) as worker:
                write_record(url=url, ready=True)
                print(
                    f"\n  open {url}/deployments   (Ctrl-C ends server and worker; logs in {service_folder()})",
                    flush=True,
                )
                _keep_alive([("server", server_command, server), ("worker", worker_command, worker)], environment)
    except KeyboardInterrupt:
        print("\nended: server and worker are down; runs continue when they are started again.")
    finally:
        remove_record()


def _interrupt(number: int, frame: FrameType | None) -> None:
    raise KeyboardInterrupt


class Child:
    """A supervised process; `process` is replaced when it has died and was started again."""

    def __init__(self, process: subprocess.Popen[bytes]) -> None:
        self.process = process


@contextmanager
def _child(name: str, command: list[str], environment: dict[str, str]) -> Iterator[Child]:
    child = Child(_start(name, command, environment))
    try:
        yield child
    finally:
        end_group(child.process, grace_s=WORKER_GRACE_S)


def _start(name: str, command: list[str], environment: dict[str, str]) -> subprocess.Popen[bytes]:
    log = service_folder() / f"{name}.log"
    log.parent.mkdir(parents=True, exist_ok=True)
    with open(log, "ab") as output:  # a file, never a pipe: the server dies of a pipe that nobody reads
        return subprocess.Popen(
            [sys.executable, *command],
            cwd=ROOT,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
            start_new_session=True,
        )


def _wait_healthy(url: str, server: Child) -> None:
    deadline = time.monotonic() + START_TIMEOUT_S
    while time.monotonic() < deadline:
        if server.process.poll() is not None:
            raise SdxlFlowsError(
                f"the Prefect server ended at once. Its log says:\n{_tail(service_folder() / 'server.log')}"
            )
        if is_healthy(url):
            return
        time.sleep(0.5)
    raise SdxlFlowsError(
        f"the Prefect server did not answer within {START_TIMEOUT_S:.0f} s; see {service_folder()}/server.log"
    )


def _keep_alive(children: list[tuple[str, list[str], Child]], environment: dict[str, str]) -> None:
    """Start a child again when it has ended, after a pause that doubles from 1 s to 60 s while it keeps ending."""
    pause_s = dict.fromkeys((name for name, _, _ in children), 1.0)
    while True:
        time.sleep(1)
        for name, command, child in children:
            if child.process.poll() is None:
                continue
            print(
                f"the {name} ended ({child.process.returncode}); starting it again in {pause_s[name]:.0f} s", flush=True
            )
            time.sleep(pause_s[name])
            pause_s[name] = min(60.0, 2 * pause_s[name])
            child.process = _start(name, command, environment)


def _tail(path: Path, num_lines: int = 15) -> str:
    return "\n".join(path.read_text("utf-8", "replace").splitlines()[-num_lines:])


def down() -> None:
    """End a service wherever it was started."""
    record = read_record()
    if record is None:
        print("nothing is running.")
        return
    os.kill(record.pid, signal.SIGTERM)
    while record.is_alive():
        time.sleep(0.2)
    print("ended: server and worker are down.")


def status() -> int:
    """Print what runs. Returns 0 where the service is up and answers, else 1."""
    record = read_record()
    if record is None:
        print("not running. `sdxl-flows up` starts it.")
        return 1
    healthy = is_healthy(record.url)
    print(f"{record.url}   process {record.pid}   server {'answers' if healthy else 'does not answer'}")
    if healthy:
        with temporary_settings({PREFECT_API_URL: f"{record.url}/api"}), get_client(sync_client=True) as client:
            for worker in client.read_workers_for_work_pool(POOL):
                print(f"worker {worker.name}: {str(worker.status.value).lower()}")
            for run in client.read_flow_runs(limit=10):
                print(f"run {run.name}: {run.state_name}")
    return 0 if healthy else 1
