"""What a flow run did, as the server tells it."""

from __future__ import annotations

import time
from collections import Counter


def task_states(flow_run_name: str) -> Counter[str]:
    """`task name: state name` counts of the newest run of a flow, once the server has caught up."""
    from prefect.client.orchestration import get_client
    from prefect.client.schemas.filters import FlowFilter, FlowRunFilter
    from prefect.client.schemas.sorting import FlowRunSort

    with get_client(sync_client=True) as client:
        newest = client.read_flow_runs(
            flow_filter=FlowFilter(name={"any_": [flow_run_name]}), sort=FlowRunSort.START_TIME_DESC, limit=1
        )
        for _ in range(60):
            runs = client.read_task_runs(flow_run_filter=FlowRunFilter(id={"any_": [newest[0].id]}))
            if runs and all(run.state is not None and run.state.is_final() for run in runs):
                break
            time.sleep(0.5)
    return Counter(f"{run.name.rsplit('-', 1)[0]}: {run.state_name}" for run in runs)
