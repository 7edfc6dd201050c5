"""What `sdxl-flows status` prints: what is running, where its logs are, the newest runs."""

from __future__ import annotations

from collections.abc import Iterator
from datetime import UTC, datetime
from http import HTTPStatus

from prefect.client.orchestration import SyncPrefectClient, get_client
from prefect.client.schemas.filters import (
    FlowFilter,
    FlowFilterId,
    FlowRunFilter,
    FlowRunFilterExpectedStartTime,
    FlowRunFilterParentTaskRunId,
)
from prefect.client.schemas.sorting import FlowRunSort
from prefect.exceptions import PrefectHTTPStatusError
from prefect.settings import PREFECT_API_URL, temporary_settings

from flows.service.deploy import POOL, is_healthy
from flows.service.record import read_record, service_folder
from sdxl_core.errors import ConfigError, SdxlFlowsError

NUM_RUNS = 10


def status() -> int:
    """Print what runs. Returns 0 where the service is up and answers, else 1.

    Raises: ConfigError: the server asks for a password, and not this one is known here.
    """
    record = read_record()
    if record is None:
        print("not running. `sdxl-flows up` starts it.")
        return 1
    healthy = is_healthy(record.url)
    print(f"{record.url}   process {record.pid}   server {'answers' if healthy else 'does not answer'}")
    print(f"logs: {service_folder()}/*.log")
    if record.curves:
        print(f"curves: {record.curves}")
    if not (healthy and record.ready):
        if not record.ready:
            print("it is still starting")
        return 1
    try:
        with temporary_settings({PREFECT_API_URL: f"{record.url}/api"}), get_client(sync_client=True) as client:
            for line in (*_workers(client), *_runs(client)):
                print(line)
    except PrefectHTTPStatusError as error:
        if error.response.status_code != HTTPStatus.UNAUTHORIZED:
            raise SdxlFlowsError(f"{record.url}: {error.response.text}") from error
        raise ConfigError(
            f"{record.url} asks for a password. Set PREFECT_API_AUTH_STRING to the 'user:password' that `up` was "
            f"started with, and ask again."
        ) from error
    return 0


def _workers(client: SyncPrefectClient) -> Iterator[str]:
    """The server takes a worker that has just died for online: so when each was last heard of."""
    now = datetime.now(UTC)
    for worker in client.read_workers_for_work_pool(POOL):
        heard = worker.last_heartbeat_time
        ago = f", last heard of {(now - heard).total_seconds():.0f} s ago" if heard else ""
        yield f"worker {worker.name}: {str(worker.status.value).lower()}{ago}"


def _runs(client: SyncPrefectClient) -> Iterator[str]:
    """The newest runs that people or schedules started: when (local time), state, flow and name."""
    runs = client.read_flow_runs(
        flow_run_filter=FlowRunFilter(
            parent_task_run_id=FlowRunFilterParentTaskRunId(is_null_=True),
            expected_start_time=FlowRunFilterExpectedStartTime(before_=datetime.now(UTC)),
        ),
        sort=FlowRunSort.START_TIME_DESC,
        limit=NUM_RUNS,
    )
    flows = client.read_flows(flow_filter=FlowFilter(id=FlowFilterId(any_=[run.flow_id for run in runs])))
    names = {flow.id: flow.name for flow in flows}
    yield "runs, newest first:" if runs else "no run yet"
    for run in runs:
        begun = run.start_time or run.expected_start_time
        when = f"{begun.astimezone():%Y-%m-%d %H:%M}" if begun else "?"
        yield f"  {when}  {run.state_name or '?':<16}{names.get(run.flow_id, '?')}  {run.name}"
