"""Who is told about a run: Prefect's automations over its notification blocks, made from the job's `notify` section.

An automation names the run itself: the server remembers a run's tags from its first event on, so a tag that a run
gives itself is in none of its events. Those of runs that have ended are removed when the next run starts. The server
evaluates them: a temporary one, gone with the run, tells nobody.
"""

from __future__ import annotations

import re
from datetime import timedelta
from uuid import UUID

from prefect import get_run_logger, runtime
from prefect.automations import Automation
from prefect.client.orchestration import SyncPrefectClient, get_client
from prefect.events.actions import SendNotification
from prefect.events.schemas.automations import EventTrigger, Posture
from prefect.events.schemas.events import ResourceSpecification
from prefect.exceptions import ObjectNotFound
from prefect.settings import PREFECT_API_URL

from flows.service.automations import RESUMED_TAG, install
from sdxl_core.config import NotifyOptions, Occasion
from sdxl_core.errors import ConfigError
from tasks.artifacts import PROGRESS_EVENT

PREFIX = "sdxl-flows: tell"
ENDS = ("Completed", "Failed", "Crashed", "Cancelled")
WORDS: dict[Occasion, str] = {
    "finished": "has finished",
    "failed": "has failed",
    "stuck": "makes no progress",
}
# The server fires before it notes that it has; where it then fails ("database is locked") it evaluates the same event
# anew. With a time to stay within, it notes when it may fire next, and that is after this event.
ONCE_WITHIN = timedelta(seconds=10)
BODY = (
    "{{ flow_run.name }} of {{ flow.name }}: {{ flow_run.state.name }}. {{ flow_run.state.message or '' }}\n"
    "{{ flow_run|ui_url }}"
)


def notify_about_this_run(options: NotifyOptions) -> None:
    """Called in a flow: have the server tell the section's blocks about its run.

    Raises: ConfigError: a block that the server does not have.
    """
    if not (options.blocks and options.on):
        return
    if not PREFECT_API_URL.value():
        get_run_logger().warning(
            "notify.blocks: nobody is told about this run, because it has no server that outlives it. Start one with "
            "`sdxl-flows up` and run the job there."
        )
        return
    with get_client(sync_client=True) as client:
        _remove_those_of_ended_runs(client)
        blocks = [block_id(client, name) for name in options.blocks]
        resumed = RESUMED_TAG in runtime.flow_run.tags
        for occasion in options.on:
            install(client, automation(occasion, options, UUID(str(runtime.flow_run.id)), blocks, resumed=resumed))


def automation(
    occasion: Occasion, options: NotifyOptions, run: UUID, blocks: list[UUID], *, resumed: bool
) -> Automation:
    """The automation for one occasion of one run.

    Args:   blocks: ids of the notification blocks' documents.   resumed: a crash is not its end, it continues.
    """
    ends = {"Completed"} if occasion == "finished" else {"Failed"} if resumed else {"Failed", "Crashed"}
    return Automation(
        name=f"{PREFIX} that run {run} {WORDS[occasion]}",
        trigger=_stuck(run, options) if occasion == "stuck" else _ended(run, ends),
        actions=[
            SendNotification(block_document_id=block, subject=f"sdxl-flows: a run {WORDS[occasion]}", body=BODY)
            for block in blocks
        ],
    )


def _ended(run: UUID, states: set[str]) -> EventTrigger:
    return EventTrigger(
        expect={f"prefect.flow-run.{state}" for state in states},
        match=ResourceSpecification({"prefect.resource.id": f"prefect.flow-run.{run}"}),
        for_each={"prefect.resource.id"},
        posture=Posture.Reactive,
        threshold=1,
        within=ONCE_WITHIN,
    )


def _stuck(run: UUID, options: NotifyOptions) -> EventTrigger:
    return EventTrigger(
        after={"prefect.flow-run.Running", PROGRESS_EVENT},
        expect={PROGRESS_EVENT, *(f"prefect.flow-run.{state}" for state in ENDS)},
        match=ResourceSpecification({"prefect.resource.id": f"prefect.flow-run.{run}"}),
        for_each={"prefect.resource.id"},
        posture=Posture.Proactive,
        threshold=1,
        within=timedelta(minutes=options.stuck_after_minutes),
    )


def _remove_those_of_ended_runs(client: SyncPrefectClient) -> None:
    for known in client.read_automations():
        found = re.match(rf"{PREFIX} that run ([0-9a-f-]{{36}}) ", known.name)
        if found is None:
            continue
        try:
            state = client.read_flow_run(UUID(found[1])).state
        except ObjectNotFound:
            state = None
        if state is None or (state.is_final() and not state.is_crashed()):
            client.delete_automation(known.id)


def block_id(client: SyncPrefectClient, name: str) -> UUID:
    """The id of a notification block, TYPE/NAME. Raises: ConfigError: the server has no such block."""
    kind, _, document = name.partition("/")
    try:
        return client.read_block_document_by_name(document, kind).id
    except ObjectNotFound as error:
        raise ConfigError(
            f"notify.blocks = {name}: the server has no such block. Make it in the browser (Blocks, +, choose the type "
            f"whose address ends in {kind}, name it {document}), or take the name out of notify.blocks."
        ) from error
