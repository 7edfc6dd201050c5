"""Crash detection survives a restart: what the server waits for is neither forgotten nor waited for in vain."""

import time
from datetime import UTC, datetime
from typing import Any
from uuid import UUID

import pytest

pytestmark = pytest.mark.usefixtures("prefect_server")


def trigger_ids(client: Any) -> list[str]:
    return [found["trigger"]["id"] for found in client.request("POST", "/automations/filter", json={}).json()]


def heard_of(client: Any, run: UUID, *, since: datetime) -> list[dict[str, Any]]:
    """Heartbeats of a run that the server has."""
    wanted = {
        "filter": {
            "event": {"name": ["prefect.flow-run.heartbeat"]},
            "resource": {"id": [f"prefect.flow-run.{run}"]},
            "occurred": {"since": since.isoformat()},
        }
    }
    return list(client.request("POST", "/events/filter", json=wanted).json()["events"])


def test_installing_again_changes_nothing_that_the_server_has_noted() -> None:
    from prefect.client.orchestration import get_client

    from flows.service.automations import install_automations

    with get_client(sync_client=True) as client:
        install_automations(client)
        before = trigger_ids(client)
        install_automations(client)
        assert before and trigger_ids(client) == before


def test_runs_that_should_be_at_work_are_waited_for_from_now_on() -> None:
    from prefect import flow
    from prefect.client.orchestration import get_client
    from prefect.states import Completed, Running

    from flows.service.automations import expect_signs_of_life

    began = datetime.now(UTC)

    @flow
    def anything() -> None: ...

    with get_client(sync_client=True) as client:
        silent = client.create_flow_run(anything, state=Running())
        ended = client.create_flow_run(anything, state=Completed())
        expect_signs_of_life(client)
        deadline = time.monotonic() + 120
        while not heard_of(client, silent.id, since=began) and time.monotonic() < deadline:
            time.sleep(0.5)
        heard = {event["id"] for event in heard_of(client, silent.id, since=began)}
        assert len(heard - {str(silent.state.id)}) == 1
        assert not heard_of(client, ended.id, since=began)
        client.set_flow_run_state(silent.id, Completed(), force=True)
