"""What a run does when its output is held by another, when it crashes again and again, and when it was cancelled.

A run that finds its output locked says by whom and schedules itself anew, later and later. A run whose process died is
scheduled again by an automation (flows/service/automations.py); here it is failed when that does not help.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from functools import wraps
from typing import ParamSpec, TypeVar
from uuid import UUID

from prefect import get_run_logger, runtime
from prefect.client.orchestration import get_client
from prefect.client.schemas.objects import State, StateType
from prefect.exceptions import Abort
from prefect.states import Cancelled, Scheduled

from sdxl_core.errors import CrashLoopError, LockedError
from sdxl_core.lock import HOLDER_RUN

P = ParamSpec("P")
T = TypeVar("T")

WAITING = "AwaitingOutput"  # name of the state of a run that waits for the holder of its output
FIRST_WAIT_S, LONGEST_WAIT_S = 15, 1800
MAX_WAITS = 340  # a week, at half an hour each
MAX_STARTS, STARTS_WITHIN = 10, timedelta(days=1)


def resuming(run_flow: Callable[P, T]) -> Callable[P, T]:
    """Below `@flow`. Acts in the run that a person or a schedule has started, not in the flows that it calls."""

    @wraps(run_flow)
    def run(*args: P.args, **kwargs: P.kwargs) -> T:
        if runtime.flow_run.parent_flow_run_id or not runtime.deployment.id:
            return run_flow(*args, **kwargs)  # nobody would start it again
        this_run = f"{runtime.flow_run.name} {runtime.flow_run.id}"
        os.environ[HOLDER_RUN] = this_run
        states = sorted(_states(), key=lambda state: state.timestamp)
        if was_being_cancelled(states):
            _cancel()
            raise Abort("it was being cancelled when its process died")
        refuse_crash_loop(states, now=datetime.now(UTC))
        try:
            return run_flow(*args, **kwargs)
        except LockedError as error:
            if error.run == this_run:
                get_run_logger().warning("This run is under way in another process, which goes on: %s", error)
                raise Abort("another process is at work on this run") from error
            _wait_for_the_holder(error)
            raise Abort("scheduled again") from error

    return run


def refuse_crash_loop(states: list[State], *, now: datetime) -> None:
    """Args: states: all that the run has had.   Raises: CrashLoopError: it was started too often within a day."""
    recent = [state for state in states if state.timestamp > now - STARTS_WITHIN]
    num_starts = sum(state.type == StateType.RUNNING for state in recent)
    num_starts -= sum(state.name == WAITING for state in recent)
    if num_starts > MAX_STARTS:
        raise CrashLoopError(
            f"this run was started {num_starts} times within a day and its process died each time; it is not started "
            f"again by itself. See what ended it (the log of the worker; `dmesg` names processes that ran out of "
            f"memory). What it had finished is kept: Retry continues there tomorrow, a new run with the same "
            f"parameters at once."
        )


def was_being_cancelled(states: list[State]) -> bool:
    """Whether somebody cancelled the attempt before this one, whose process was gone before it could obey.

    Args: states: all that the run has had, in the order of time, the start of this attempt last.
    """
    types = [state.type for state in states]
    starts = [number for number, kind in enumerate(types) if kind == StateType.RUNNING]
    between = types[starts[-2] : starts[-1]] if len(starts) > 1 else []
    return StateType.CANCELLING in between and StateType.CANCELLED not in between


def _cancel() -> None:
    with get_client(sync_client=True) as client:
        client.set_flow_run_state(_this_run(), Cancelled(), force=True)


def wait_s(num_waits: int) -> int:
    """Seconds until the next look at a locked output: 15, doubled each time up to half an hour."""
    return min(LONGEST_WAIT_S, FIRST_WAIT_S << min(num_waits, 10))


def _wait_for_the_holder(error: LockedError) -> None:
    """Schedule this run anew. Raises: LockedError: it has waited for a week."""
    num_waits = sum(state.name == WAITING for state in _states())
    if num_waits >= MAX_WAITS:
        raise error
    seconds = wait_s(num_waits)
    get_run_logger().warning("%s This run looks again in %s s.", error, seconds)
    state: State = Scheduled(
        name=WAITING,
        message=f"looks again in {seconds} s: {error}",
        scheduled_time=datetime.now(UTC) + timedelta(seconds=seconds),
    )
    with get_client(sync_client=True) as client:
        client.set_flow_run_state(_this_run(), state, force=True)


def _states() -> list[State]:
    with get_client(sync_client=True) as client:
        return client.read_flow_run_states(_this_run())


def _this_run() -> UUID:
    return UUID(str(runtime.flow_run.id))
