"""A run tells whom its job names, through the server's own automations and blocks."""

import json
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import pytest
from support.service import ROOT, Service, wait_until

pytestmark = pytest.mark.system

MAKE_BLOCK = """
import sys
from prefect.blocks.notifications import CustomWebhookNotificationBlock
CustomWebhookNotificationBlock(
    name="hook", url=sys.argv[1], json_data={"subject": "{{subject}}", "body": "{{body}}"}
).save("test-hook", overwrite=True)
"""


@pytest.fixture
def received() -> Iterator[tuple[str, list[dict[str, str]]]]:
    """The address of a webhook, and what it was told."""
    told: list[dict[str, str]] = []

    class Hook(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            told.append(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
            self.send_response(200)
            self.end_headers()

        def log_message(self, *words: object) -> None:
            pass

    with HTTPServer(("127.0.0.1", 0), Hook) as server:
        thread = threading.Thread(target=server.serve_forever, daemon=True)
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}/", told
        server.shutdown()


def test_a_failed_run_is_told_to_the_webhook_that_its_job_names(
    service: Service, received: tuple[str, list[dict[str, str]]], tmp_path: Path
) -> None:
    url, told = received
    made = subprocess.run(
        [sys.executable, "-c", MAKE_BLOCK, url],
        env=service.environment, cwd=ROOT, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert made.returncode == 0, made.stderr
    job = {"out": str(tmp_path / "out"), "source": {"path": str(tmp_path / "nothing")}}
    notify = {"blocks": ["custom-webhook/test-hook"], "on": ["failed"]}
    run = service.prefect(
        "deployment", "run", "pipeline/pipeline", "--params", json.dumps({"job": job | {"notify": notify}}), "--watch"
    )
    assert run.returncode != 0
    wait_until(lambda: told, timeout_s=180, what=f"a call of the webhook ({run.stdout}{run.stderr})")
    assert all(once_more == told[0] for once_more in told)  # it has come twice on a loaded machine
    assert told[0]["subject"] == "sdxl-flows: a run has failed"
    assert "of pipeline: Failed" in told[0]["body"] and "does not exist" in told[0]["body"]


def test_a_block_that_is_not_there_is_told_by_its_name(service: Service, tmp_path: Path) -> None:
    job = {
        "out": str(tmp_path / "out"),
        "source": {"path": str(tmp_path)},
        "notify": {"blocks": ["slack-webhook/none"]},
    }
    run = service.prefect("deployment", "run", "pipeline/pipeline", "--params", json.dumps({"job": job}), "--watch")
    assert run.returncode != 0
    log = service.folder / "home" / "worker.log"
    wait_until(lambda: "no such block" in log.read_text(), timeout_s=60, what="the reason in the worker's log")
