"""Runs whose machine is gone: nobody tells of their deaths, so that the server notices them by their silence."""

import pytest
from support.service import Service
from support.system_runs import names_of

pytestmark = pytest.mark.system


def test_runs_whose_heartbeat_stopped_have_crashed_and_the_tagged_one_is_done(service: Service) -> None:
    """They were lost when the service had started; other tests ran while the server waited."""
    at_work, left, never_started = service.lost_runs
    for run in (at_work, never_started):
        service.wait_for(run, "Completed", timeout_s=400)
        noticed = [name for name in names_of(service, run) if name in ("Crashed", "AwaitingRetry")]
        assert noticed[:2] == ["Crashed", "AwaitingRetry"], noticed  # again where another test killed its new worker
    assert names_of(service, left) == ["Running", "Crashed"]
