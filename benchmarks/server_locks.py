"""Writes that a Prefect server on SQLite refuses: its own start, and `sdxl-flows up`'s, in turn.

    python benchmarks/server_locks.py [--requests 4000] [--repeats 3]

What a browser and running jobs send at once: four clients create flow runs and carry them through their states, one
sends heartbeats. Nobody asks again after a refusal, as a browser does not. Each server has a database of its own.
"""

from __future__ import annotations

import argparse
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from datetime import UTC, datetime
from socket import socket
from uuid import uuid4

import httpx
from measure import machine

from flows.service.up import SERVER

CLIENTS = 4
STATES = ("PENDING", "RUNNING", "COMPLETED")
PLAIN = ("-m", "prefect", "server", "start")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--requests", type=int, default=4000, help="the largest of three loads, N, 4N and 16N")
    parser.add_argument("--repeats", type=int, default=3)
    options = parser.parse_args()
    print(f"{machine()}\n")
    print("| requests | server | refused, each run | of a request, ms: median (99 of 100 within) | requests/s |")
    print("|---|---|---|---|---|")
    for requests in (options.requests // 16, options.requests // 4, options.requests):
        loads: dict[str, list[Load]] = {"prefect server start": [], "sdxl-flows up's": []}
        for _ in range(options.repeats):
            for name, command in zip(loads, (PLAIN, SERVER), strict=True):
                with serving(command) as url:
                    loads[name].append(Load(url, requests))
        for name, done in loads.items():
            refused = ", ".join(str(sum(load.refusals.values())) for load in done)
            median, late = (statistics.median(load.milliseconds(share) for load in done) for share in (0.5, 0.99))
            rate = statistics.median(len(load.seconds) / load.wall_s for load in done)
            print(f"| {requests:,} | {name} | {refused} | {median:.0f} ({late:.0f}) | {rate:.0f} |", flush=True)


class Load:
    """So many requests, sent to a server as fast as it answers."""

    def __init__(self, url: str, requests: int) -> None:
        self.url, self.seconds, self.refusals = url, list[float](), Counter[str]()
        with httpx.Client(base_url=url, timeout=120) as client:
            self.flow = client.post("/flows/", json={"name": "load"}).json()["id"]
        started = time.monotonic()
        with ThreadPoolExecutor(CLIENTS + 1) as pool:
            workers = [pool.submit(self.runs, requests // CLIENTS) for _ in range(CLIENTS)]
            beating = pool.submit(self.heartbeats, workers)
            for worker in [*workers, beating]:
                worker.result()
        self.wall_s = time.monotonic() - started

    def runs(self, requests: int) -> None:
        with httpx.Client(base_url=self.url, timeout=120) as client:
            for _ in range(requests // (1 + len(STATES))):
                made = self.send(client, "/flow_runs/", {"flow_id": self.flow, "state": {"type": "SCHEDULED"}})
                for state in STATES if made else ():
                    self.send(client, f"/flow_runs/{made['id']}/set_state", {"state": {"type": state}})

    def heartbeats(self, workers: list) -> None:  # type: ignore[type-arg]
        with httpx.Client(base_url=self.url, timeout=120) as client:
            while not all(worker.done() for worker in workers):
                self.send(client, "/events", [heartbeat() for _ in range(8)])
                time.sleep(0.1)

    def send(self, client: httpx.Client, path: str, body: object) -> dict[str, str]:
        """Returns what the server made, {} where it refused or has nothing to say."""
        started = time.monotonic()
        try:
            answer = client.post(path, json=body)
            self.seconds.append(time.monotonic() - started)
            answer.raise_for_status()
        except httpx.HTTPStatusError as error:
            self.refusals[f"{error.response.status_code}"] += 1
        except httpx.TransportError as error:
            self.refusals[type(error).__name__] += 1
        else:
            return dict(answer.json()) if answer.content else {}
        return {}

    def milliseconds(self, share: float) -> float:
        return 1000 * sorted(self.seconds)[int(share * (len(self.seconds) - 1))]


def heartbeat() -> dict[str, object]:
    return {
        "event": "prefect.flow-run.heartbeat",
        "resource": {"prefect.resource.id": f"prefect.flow-run.{uuid4()}"},
        "occurred": datetime.now(UTC).isoformat(),
        "id": str(uuid4()),
    }


@contextmanager
def serving(command: tuple[str, ...]) -> Iterator[str]:
    """Gives: the API's address of a server that ends afterwards."""
    with socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    url = f"http://127.0.0.1:{port}/api"
    with tempfile.TemporaryDirectory() as home:
        argv = [sys.executable, *command, "--host", "127.0.0.1", "--port", str(port)]
        environment = os.environ | {"PREFECT_HOME": home}
        server = subprocess.Popen(argv, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        try:
            deadline = time.monotonic() + 180
            while time.monotonic() < deadline and not answers(url):
                time.sleep(0.5)
            yield url
        finally:
            server.send_signal(signal.SIGTERM)
            server.wait(60)


def answers(url: str) -> bool:
    try:
        return httpx.get(f"{url}/health", timeout=5).is_success
    except httpx.HTTPError:
        return False


if __name__ == "__main__":
    main()
