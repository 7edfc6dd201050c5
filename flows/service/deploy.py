"""Work pool, automations and deployments on a server: for `up`, and as `python -m flows.service.deploy` for systemd."""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import time
import urllib.request
from contextlib import suppress
from pathlib import Path

from prefect.client.orchestration import SyncPrefectClient, get_client
from prefect.client.schemas.actions import DeploymentUpdate, WorkPoolCreate
from prefect.client.schemas.filters import WorkPoolFilter, WorkPoolFilterName
from prefect.exceptions import ObjectAlreadyExists
from prefect.settings import PREFECT_API_URL, temporary_settings

from flows.service.automations import expect_signs_of_life, install_automations
from sdxl_core.errors import ConfigError, SdxlFlowsError

POOL = "sdxl-flows"
ROOT = Path(__file__).resolve().parents[2]
DEPLOY = ("-m", "prefect", "--no-prompt", "deploy", "--prefect-file", "deployments/prefect.yaml", "--all")


def is_healthy(url: str) -> bool:
    """Whether a server answers there."""
    try:
        with urllib.request.urlopen(f"{url}/api/health", timeout=5) as answer:
            return bool(answer.status == 200)
    except OSError:
        return False


def deploy(url: str, environment: dict[str, str]) -> None:
    """Create the work pool, install the automations, deploy every flow; what is there is brought up to date.

    Runs that a power cut has ended are noticed from here on.

    Args: url: of the server, without /api.   Raises: SdxlFlowsError: a flow cannot be deployed, in Prefect's words.
    """
    with temporary_settings({PREFECT_API_URL: f"{url}/api"}), get_client(sync_client=True) as client:
        with suppress(ObjectAlreadyExists):
            client.create_work_pool(WorkPoolCreate(name=POOL, type="process"))
        install_automations(client)
    done = subprocess.run(
        [sys.executable, *DEPLOY], cwd=ROOT, env=environment, capture_output=True, text=True, check=False
    )
    if done.returncode:
        raise SdxlFlowsError(f"the flows could not be deployed:\n{done.stdout[-2000:]}{done.stderr[-2000:]}")
    with temporary_settings({PREFECT_API_URL: f"{url}/api"}), get_client(sync_client=True) as client:
        _refuse_unknown_parameters(client)
    wait_for_runs(url)


def _refuse_unknown_parameters(client: SyncPrefectClient) -> None:
    """Prefect refuses unknown names within a section, but takes one beside it, and the run's process dies of it."""
    pool = WorkPoolFilter(name=WorkPoolFilterName(any_=[POOL]))
    for deployment in client.read_deployments(work_pool_filter=pool):
        schema = (deployment.parameter_openapi_schema or {}) | {"additionalProperties": False}
        client.update_deployment(deployment.id, DeploymentUpdate(parameter_openapi_schema=schema))


def wait_for_runs(url: str) -> None:
    """Have the server wait for signs of the runs that should be at work, after it or their worker has started anew."""
    with temporary_settings({PREFECT_API_URL: f"{url}/api"}), get_client(sync_client=True) as client:
        expect_signs_of_life(client)


def main() -> None:
    """Deploy to the server of PREFECT_API_URL, once it answers."""
    parser = argparse.ArgumentParser(prog="python -m flows.service.deploy", description=main.__doc__)
    parser.add_argument("--wait", type=float, default=0, metavar="SECONDS", help="wait this long for the server")
    parser.add_argument("--runs-only", action="store_true", help="deploy nothing; wait for signs of the runs at work")
    options = parser.parse_args()
    api = PREFECT_API_URL.value()
    try:
        if not api:
            raise ConfigError("PREFECT_API_URL is not set. Set it to the server's address, http://127.0.0.1:4200/api.")
        url = api.rstrip("/").removesuffix("/api")
        deadline = time.monotonic() + options.wait
        while not is_healthy(url):
            if time.monotonic() >= deadline:
                raise SdxlFlowsError(f"{url}: no server answers there. Start it (`sdxl-flows up`), then again.")
            time.sleep(1)
        if options.runs_only:
            wait_for_runs(url)
        else:
            deploy(url, dict(os.environ))
    except SdxlFlowsError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(error.exit_status)


if __name__ == "__main__":
    main()
