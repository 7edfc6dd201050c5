"""What a flow run did, as the server tells it."""

from __future__ import annotations

import time
from collections import Counter

TOLD_WITHIN_S = 60.0


def task_states(flow_name: str, *, num_tasks: int) -> Counter[str]:
    """`task name: state name` counts of the newest run of a flow, which had so many task runs and has ended.

    They reach the server one event after the other, behind the end of the flow: all that are there may have ended
    before the next one appears.
    """
    from prefect.client.orchestration import get_client
    from prefect.client.schemas.filters import FlowFilter, FlowRunFilter
    from prefect.client.schemas.sorting import FlowRunSort

    with get_client(sync_client=True) as client:
        newest = client.read_flow_runs(
            flow_filter=FlowFilter(name={"any_": [flow_name]}), sort=FlowRunSort.START_TIME_DESC, limit=1
        )
        deadline = time.monotonic() + TOLD_WITHIN_S
        while True:
            runs = client.read_task_runs(flow_run_filter=FlowRunFilter(id={"any_": [newest[0].id]}))
            states = Counter(f"{run.name.rsplit('-', 1)[0]}: {run.state_name}" for run in runs)
            ended = sum(run.state is not None and run.state.is_final() for run in runs)
            if ended == len(runs) == num_tasks:
                return states
            assert len(runs) <= num_tasks and time.monotonic() < deadline, f"{ended} of {num_tasks} ended: {states}"
            time.sleep(0.5)
