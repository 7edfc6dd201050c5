"""`sdxl-flows up` in a home of its own, and the command line over it."""

import json
import os
import secrets
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, TypeVar
from uuid import UUID

ROOT = Path(__file__).parents[2]
T = TypeVar("T")


class Service:
    """The command line over a service of its own."""

    def __init__(self, folder: Path) -> None:
        self.port, self.curves_port = free_ports(2)
        self.folder, self.database_url = folder, ""
        self.lost_runs: tuple[UUID, ...] = ()
        self.environment = os.environ | {
            "PREFECT_HOME": str(folder / "prefect"),
            "SDXL_FLOWS_HOME": str(folder / "home"),
            "PREFECT_API_URL": f"http://127.0.0.1:{self.port}/api",
            "PREFECT_WORKER_QUERY_SECONDS": "2",
        }

    def up(self, *options: str) -> subprocess.CompletedProcess[str]:
        """Start it in the background, on its own ports."""
        ports = ["--port", str(self.port), "--tensorboard-port", str(self.curves_port)]
        return self.command("up", "--detach", *ports, *options)

    def command(self, *argv: str, changed: Mapping[str, str] = {}) -> subprocess.CompletedProcess[str]:
        """Args: changed: in the environment."""
        command, environment = [sys.executable, "-m", "sdxl_core.cli", *argv], self.environment | changed
        return subprocess.run(
            command, env=environment, cwd=ROOT, capture_output=True, text=True, timeout=600, check=False
        )

    def prefect(self, *argv: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "prefect", *argv]
        return subprocess.run(
            command, env=self.environment, cwd=ROOT, capture_output=True, text=True, timeout=600, check=False
        )

    def submit(self, deployment: str, parameters: dict[str, Any]) -> UUID:
        """Have a deployment run. Returns the run's id."""
        with self.client() as client:
            found = client.read_deployment_by_name(deployment)
            return client.create_flow_run_from_deployment(found.id, parameters=parameters).id

    def wait_for(self, run: UUID, name: str, *, timeout_s: float = 300) -> Any:
        """The run's state, once it has this name. Fails where it ended otherwise, with its states and last words."""

        def look() -> Any:
            with self.client() as client:
                state = client.read_flow_run(run).state
            assert state is not None
            is_there = state.name == name
            assert is_there or not (state.is_completed() or state.is_failed() or state.is_cancelled())
            return state if is_there else None

        try:
            return wait_until(look, timeout_s=timeout_s, what=f"state {name} of run {run}")
        except AssertionError as failure:
            raise AssertionError(f"run {run} is not {name}:\n{self.story_of(run)}") from failure

    def story_of(self, run: UUID) -> str:
        """What happened to a run: its states, then the end of its log."""
        from prefect.client.schemas.filters import LogFilter, LogFilterFlowRunId
        from prefect.client.schemas.sorting import LogSort

        logs_of = LogFilter(flow_run_id=LogFilterFlowRunId(any_=[run]))
        with self.client() as client:
            states = sorted(client.read_flow_run_states(run), key=lambda state: state.timestamp)
            logs = client.read_logs(log_filter=logs_of, sort=LogSort.TIMESTAMP_DESC, limit=50)
        lines = [f"{state.timestamp:%H:%M:%S} {state.name}: {state.message or ''}" for state in states]
        return "\n".join(lines + [f"{log.timestamp:%H:%M:%S} {log.message}" for log in reversed(logs)])

    def answers(self) -> bool:
        """Whether the server does."""
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{self.port}/api/health", timeout=5) as answer:
                return bool(answer.status == 200)
        except OSError:
            return False

    def runs_with_curves(self) -> list[str]:
        """What its TensorBoard knows; nothing while it does not answer."""
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{self.curves_port}/data/runs", timeout=20) as answer:
                return list(json.load(answer))
        except OSError:
            return []

    def client(self) -> Any:
        """A client of this service's server."""
        from prefect.client.orchestration import SyncPrefectClient

        return SyncPrefectClient(api=self.environment["PREFECT_API_URL"])

    def processes(self) -> list[int]:
        """Every process that was started with this service's home."""
        mark = f"SDXL_FLOWS_HOME={self.folder / 'home'}".encode()
        found = []
        for entry in Path("/proc").iterdir():
            if entry.name.isdigit() and int(entry.name) != os.getpid():
                try:
                    if mark in (entry / "environ").read_bytes():
                        found.append(int(entry.name))
                except (FileNotFoundError, PermissionError, ProcessLookupError):
                    continue
        return found


def free_ports(number: int) -> list[int]:
    """Ports of this machine that nobody listens on, below those that the system gives to connections."""
    found: list[int] = []
    while len(found) < number:
        port = 15_000 + secrets.randbelow(17_000)
        with socket.socket() as probe, suppress(OSError):
            probe.bind(("127.0.0.1", port))
            found.append(port)
    return list(found)


def wait_until(look: Callable[[], T | None], *, timeout_s: float, what: str) -> T:
    """What `look` gives once that is true, asked twice a second."""
    deadline = time.monotonic() + timeout_s
    while time.monotonic() < deadline:
        if found := look():
            return found
        time.sleep(0.5)
    raise AssertionError(f"{what}: not within {timeout_s:.0f} s")
