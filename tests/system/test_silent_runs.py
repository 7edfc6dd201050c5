"""Runs whose machine is gone: nobody tells of their deaths, so that the server notices them by their silence."""

import pytest
from support.service import Service
from support.system_runs import names_of

pytestmark = pytest.mark.system


def test_runs_whose_heartbeat_stopped_have_crashed_and_the_tagged_one_is_done(service: Service) -> None:
    """They were lost when the service had started; other tests ran while the server waited."""
    resumed, left = service.lost_runs
    service.wait_for(resumed, "Completed", timeout_s=240)
    assert [name for name in names_of(service, resumed) if name in ("Crashed", "AwaitingRetry")] == [
        "Crashed", "AwaitingRetry",
    ]  # fmt: skip
    assert names_of(service, left) == ["Running", "Crashed"]
