"""Two automations that make a crashed run tagged `auto-resume` continue by itself.

Proactive on purpose: one death is reported as Crashed twice, 1-6 s apart, and a reactive trigger answers both reports
with an attempt of its own. The lock on the output (sdxl_core/lock.py) covers what is left of that race.
"""

from __future__ import annotations

from datetime import timedelta

from prefect.automations import Automation, AutomationCore
from prefect.client.orchestration import SyncPrefectClient
from prefect.client.schemas.objects import StateType
from prefect.events.actions import ChangeFlowRunState
from prefect.events.schemas.automations import EventTrigger, Posture
from prefect.events.schemas.events import ResourceSpecification

FLOW_RUNS = ResourceSpecification({"prefect.resource.id": "prefect.flow-run.*"})
AUTO_RESUME = ResourceSpecification({"prefect.resource.role": "tag", "prefect.resource.id": "prefect.tag.auto-resume"})
SILENT_AFTER_S = 95  # three heartbeats of 30 s, and a little


def crash_silent_runs() -> Automation:
    """No heartbeat for 95 s -> Crashed: after a power cut nobody is left to report it."""
    return Automation(
        name="sdxl-flows: silent runs have crashed",
        trigger=EventTrigger(
            after={"prefect.flow-run.heartbeat"},
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
    """Create an automation, or bring the one of its name up to date."""
    content = AutomationCore.model_validate(automation.model_dump(exclude={"id", "owner_resource"}))
    known = client.read_automations_by_name(automation.name)
    if known:
        client.update_automation(known[0].id, content)
    else:
        client.create_automation(content)
