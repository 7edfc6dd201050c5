"""A run's end is told once, also where the server looks at the same event twice."""

import asyncio
from uuid import uuid4

import pytest

pytestmark = pytest.mark.usefixtures("prefect_server")


@pytest.mark.filterwarnings("ignore:Type object .* does not refer to an OperatorClass")  # Prefect's server models
def test_an_end_that_the_server_evaluates_twice_is_told_once() -> None:
    """It does when another automation's evaluation of the event fails ("database is locked"): it begins anew."""
    from prefect.client.orchestration import get_client
    from prefect.server.events import triggers
    from prefect.server.events.models.automations import automations_session, read_automations_for_workspace
    from prefect.server.events.schemas.events import ReceivedEvent, Resource
    from prefect.server.utilities.messaging.memory import Topic
    from prefect.types._datetime import now

    from flows.service.automations import install
    from flows.service.notifications import automation
    from sdxl_core.config import NotifyOptions

    run = uuid4()
    with get_client(sync_client=True) as client:
        install(client, automation("failed", NotifyOptions(blocks=["a/b"], on=["failed"]), run, [uuid4()]))
    told = Topic.by_name("actions").subscribe()

    async def evaluate_twice() -> None:
        async with automations_session() as session:
            for known in await read_automations_for_workspace(session=session):
                triggers.load_automation(known)
        event = ReceivedEvent(
            id=uuid4(), occurred=now("UTC"), received=now("UTC"), event="prefect.flow-run.Failed",
            resource=Resource({"prefect.resource.id": f"prefect.flow-run.{run}"}),
        )  # fmt: skip
        for _ in range(2):
            await triggers.reactive_evaluation(event)

    try:
        asyncio.run(evaluate_twice())
        assert told._queue.qsize() == 1
    finally:
        triggers.clear_loaded_automations()
        Topic.by_name("actions").unsubscribe(told)
