"""Two automations that make a crashed run tagged `auto-resume` continue by itself.

Proactive on purpose: one death is reported as Crashed twice, 1-6 s apart, and a reactive trigger answers both reports
with an attempt of its own. The lock on the output (sdxl_core/lock.py) covers what is left of that race.
"""

from __future__ import annotations

from datetime import timedelta
from uuid import UUID

from prefect.automations import Automation, AutomationCore
from prefect.client.orchestration import SyncPrefectClient
from prefect.client.schemas.filters import FlowRunFilter
from prefect.client.schemas.objects import StateType
from prefect.events.actions import ChangeFlowRunState
from prefect.events.schemas.automations import EventTrigger, Posture
from prefect.events.schemas.events import Event, Resource, ResourceSpecification

FLOW_RUNS = ResourceSpecification({"prefect.resource.id": "prefect.flow-run.*"})
RESUMED_TAG = "auto-resume"
AUTO_RESUME = ResourceSpecification(
    {"prefect.resource.role": "tag", "prefect.resource.id": f"prefect.tag.{RESUMED_TAG}"}
)
HEARTBEAT = "prefect.flow-run.heartbeat"
PAGE = 200  # runs the server gives at once
SILENT_AFTER_S = 95  # three heartbeats of 30 s, and a little


def crash_silent_runs() -> Automation:
    """No heartbeat for 95 s -> Crashed: after a power cut nobody is left to report it."""
    return Automation(
        name="sdxl-flows: silent runs have crashed",
        trigger=EventTrigger(
            after={HEARTBEAT},
            expect={"prefect.flow-run.*"},
            match=FLOW_RUNS,
            for_each={"prefect.resource.id"},
            posture=Posture.Proactive,
            threshold=1,
            within=timedelta(seconds=SILENT_AFTER_S),
        ),
        actions=[ChangeFlowRunState(state=StateType.CRASHED, message="no heartbeat")],
    )


def resume_crashed_runs() -> Automation:
    """Crashed, and within 20 s nothing else happened to the run -> scheduled again."""
    return Automation(
        name="sdxl-flows: crashed runs continue",
        trigger=EventTrigger(
            after={"prefect.flow-run.Crashed"},
            expect={f"prefect.flow-run.{name}" for name in ("Scheduled", "AwaitingRetry", "Pending", "Running")},
            match=FLOW_RUNS,
            match_related=AUTO_RESUME,
            for_each={"prefect.resource.id"},
            posture=Posture.Proactive,
            threshold=1,
            within=timedelta(seconds=20),
        ),
        actions=[
            ChangeFlowRunState(state=StateType.SCHEDULED, name="AwaitingRetry", message="continues after a crash")
        ],
    )


def install_automations(client: SyncPrefectClient) -> None:
    """Create both, or bring those of an earlier start up to date."""
    for automation in (crash_silent_runs(), resume_crashed_runs()):
        install(client, automation)


def install(client: SyncPrefectClient, automation: Automation) -> None:
    """Create an automation, or bring the one of its name up to date.

    One that is as it should be stays untouched: an update gives its trigger another id, and what the server had noted
    for it (which runs were last heard of when) is never looked at again.
    """
    content = _content(automation)
    known = client.read_automations_by_name(automation.name)
    if not known:
        client.create_automation(content)
    elif _content(known[0]) != content:
        client.update_automation(known[0].id, content)


def _content(automation: AutomationCore) -> AutomationCore:
    return AutomationCore.model_validate(automation.model_dump(exclude={"id", "owner_resource"}))


def expect_signs_of_life(client: SyncPrefectClient) -> None:
    """From now on, the server waits for the next sign of every run that should be at work. For a server that started.

    What it had noted may be gone: lost with its memory, refused by a locked database, or never written for a run that
    died before its first heartbeat. Each such run gets a heartbeat of ours; one that is alive goes on with its own,
    one that is dead has crashed when none follows.

    A server puts an event that follows another of the last five minutes aside for a quarter of an hour where it has not
    seen that other, and a new server has seen none. A crash follows the state before it; so that it is acted on at
    once, the state's event is told again, by its id (which is the state's).
    """
    at_work = FlowRunFilter(state={"type": {"any_": [StateType.RUNNING, StateType.PENDING]}})
    offset = 0
    while runs := client.read_flow_runs(flow_run_filter=at_work, limit=PAGE, offset=offset):
        offset += len(runs)
        signs = [_heartbeat(run.id, id=run.state.id) for run in runs if run.state is not None]
        signs += [_heartbeat(run.id) for run in runs]
        client.request("POST", "/events", json=[sign.model_dump(mode="json") for sign in signs])


def _heartbeat(run: UUID, **known: UUID) -> Event:
    return Event(event=HEARTBEAT, resource=Resource({"prefect.resource.id": f"prefect.flow-run.{run}"}), **known)
