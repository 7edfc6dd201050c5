"""A run's end is told once, also where the server looks at the same event twice; a run that stands still is told."""

import asyncio
from collections.abc import Iterable
from datetime import timedelta
from typing import Any
from uuid import uuid4

import pytest

from sdxl_core.config import NotifyOptions, Occasion
from sdxl_core.errors import ConfigError

pytestmark = [
    pytest.mark.usefixtures("prefect_server"),
    pytest.mark.filterwarnings("ignore:Type object .* does not refer to an OperatorClass"),  # Prefect's server models
]


def times_told(
    occasion: Occasion, events: Iterable[str], *, resumed: bool = True, later: timedelta | None = None
) -> int:
    """How often the server, asked by a run to tell of an occasion, acts on these events of the run.

    Args: later: when it looks at the time again, after the last event.
    """
    from prefect.client.orchestration import get_client
    from prefect.server.events import triggers
    from prefect.server.events.models.automations import automations_session, read_automations_for_workspace
    from prefect.server.events.schemas.events import ReceivedEvent, Resource
    from prefect.server.utilities.messaging.memory import Topic
    from prefect.types._datetime import now

    from flows.service.automations import install
    from flows.service.notifications import automation

    run = uuid4()
    wanted = automation(
        occasion, NotifyOptions(blocks=("a/b",), stuck_after_minutes=2), run, [uuid4()], resumed=resumed
    )
    with get_client(sync_client=True) as client:
        install(client, wanted)
    told = Topic.by_name("actions").subscribe()

    def event(name: str) -> Any:
        return ReceivedEvent(
            id=uuid4(), occurred=now("UTC"), received=now("UTC"), event=name,
            resource=Resource({"prefect.resource.id": f"prefect.flow-run.{run}"}),
        )  # fmt: skip

    async def evaluate() -> None:
        async with automations_session() as session:
            for known in await read_automations_for_workspace(session=session):
                if known.name == wanted.name:
                    triggers.load_automation(known)
        for name in events:
            await triggers.reactive_evaluation(event(name))
        if later is not None:
            (loaded,) = triggers.automations_by_id.values()
            await triggers.proactive_evaluation(loaded.trigger, now("UTC") + later)

    try:
        asyncio.run(evaluate())
        return int(told._queue.qsize())
    finally:
        triggers.clear_loaded_automations()
        Topic.by_name("actions").unsubscribe(told)


def test_an_end_that_the_server_evaluates_twice_is_told_once() -> None:
    """It does when another automation's evaluation of the event fails ("database is locked"): it begins anew."""
    assert times_told("failed", ["prefect.flow-run.Failed"] * 2) == 1


def test_each_end_is_told_to_who_asked_for_it() -> None:
    assert times_told("finished", ["prefect.flow-run.Completed"]) == 1
    assert times_told("finished", ["prefect.flow-run.Failed"]) == 0
    assert times_told("failed", ["prefect.flow-run.Completed"]) == 0


def test_a_crash_is_told_where_the_run_does_not_continue_by_itself() -> None:
    assert times_told("failed", ["prefect.flow-run.Crashed"], resumed=False) == 1
    assert times_told("failed", ["prefect.flow-run.Crashed"], resumed=True) == 0


def test_a_run_without_progress_is_told_and_one_that_gets_on_is_not() -> None:
    began, progress = "prefect.flow-run.Running", "sdxl-flows.progress"
    assert times_told("stuck", [began], later=timedelta(minutes=3)) == 1
    assert times_told("stuck", [began, progress], later=timedelta(minutes=3)) == 1, "it stands still after that"
    assert times_told("stuck", [began, progress], later=timedelta(minutes=1)) == 0
    assert times_told("stuck", [began, "prefect.flow-run.Completed"], later=timedelta(minutes=3)) == 0


@pytest.mark.filterwarnings("ignore:'imghdr' is deprecated")  # what Prefect's SendgridEmail imports
def test_every_kind_of_block_can_be_named() -> None:
    """Slack, e-mail and webhook, as the server keeps them; what it does not have is told by its name."""
    from prefect.blocks.notifications import CustomWebhookNotificationBlock, SendgridEmail, SlackWebhook
    from prefect.client.orchestration import get_client

    from flows.service.notifications import block_id

    kept = [
        SlackWebhook(url="https://hooks.slack.com/services/a/b/c").save("team", overwrite=True),
        SendgridEmail(api_key="k", sender_email="a@b.invalid", to_emails=["c@d.invalid"]).save("me", overwrite=True),
        CustomWebhookNotificationBlock(name="hook", url="http://127.0.0.1:1").save("hook", overwrite=True),
    ]
    names = ("slack-webhook/team", "sendgrid-email/me", "custom-webhook/hook")
    with get_client(sync_client=True) as client:
        assert [block_id(client, name) for name in NotifyOptions(blocks=names).blocks] == kept
        with pytest.raises(ConfigError, match=r"notify\.blocks = slack-webhook/none: the server has no such block"):
            block_id(client, "slack-webhook/none")
