"""What a browser sends is taken the first time, whatever else the server is writing: it does not ask again."""

import json
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
from support.service import Service

pytestmark = pytest.mark.system

CLIENTS, RUNS = 4, 15  # of the server as Prefect starts it, one request in five is refused


def test_jobs_submitted_at_once_are_all_taken(service: Service) -> None:
    def post(path: str, body: dict[str, Any]) -> dict[str, Any]:
        request = urllib.request.Request(
            f"http://127.0.0.1:{service.port}/api{path}",
            json.dumps(body).encode(),
            {"Content-Type": "application/json"},
        )
        with urllib.request.urlopen(request, timeout=60) as answer:  # an HTTPError where it is refused
            return dict(json.load(answer))

    def submit(number: int) -> str:
        run = post("/flow_runs/", {"flow_id": flow, "state": {"type": "SCHEDULED"}})
        changed = post(f"/flow_runs/{run['id']}/set_state", {"state": {"type": "COMPLETED", "name": f"{number}"}})
        assert changed["status"] == "ACCEPT"
        return str(run["id"])

    flow = post("/flows/", {"name": "submitted-at-once"})["id"]
    with ThreadPoolExecutor(CLIENTS) as pool:
        runs = list(pool.map(submit, range(CLIENTS * RUNS)))
    assert len(set(runs)) == CLIENTS * RUNS
