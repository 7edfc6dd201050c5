"""When a run is started again, and when that ends."""

from datetime import UTC, datetime, timedelta

import pytest
from prefect.client.schemas.objects import State
from prefect.states import Cancelled, Cancelling, Crashed, Running, Scheduled

from flows.resuming import LONGEST_WAIT_S, MAX_STARTS, WAITING, refuse_crash_loop, wait_s, was_being_cancelled
from sdxl_core.errors import CrashLoopError

NOW = datetime(2026, 11, 25, 12, tzinfo=UTC)


def history(*ages_h: float, then: State) -> list[State]:
    """Starts so many hours ago, each followed by `then`."""
    times = [NOW - timedelta(hours=age) for age in ages_h]
    return [state.model_copy(update={"timestamp": time}) for time in times for state in (Running(), then)]


def test_a_run_whose_process_keeps_dying_is_failed_in_words() -> None:
    ages = [number / 10 for number in range(MAX_STARTS + 1)]
    with pytest.raises(CrashLoopError, match=f"started {MAX_STARTS + 1} times within a day.*log of the worker"):
        refuse_crash_loop(history(*ages, then=Crashed()), now=NOW)
    refuse_crash_loop(history(*ages[:-1], then=Crashed()), now=NOW)


def test_a_crash_every_few_hours_for_weeks_is_no_loop() -> None:
    refuse_crash_loop(history(*range(0, 24 * 45, 3), then=Crashed()), now=NOW)


def test_waiting_for_another_is_no_crash() -> None:
    refuse_crash_loop(history(*[0.1] * 50, then=Scheduled(name=WAITING)), now=NOW)


def test_waits_double_up_to_half_an_hour() -> None:
    assert [wait_s(number) for number in range(4)] == [15, 30, 60, 120]
    assert wait_s(300) == LONGEST_WAIT_S == 1800


def test_a_run_that_was_being_cancelled_when_it_died_is_not_continued() -> None:
    assert was_being_cancelled([Running(), Cancelling(), Crashed(), Scheduled(), Running()])
    assert not was_being_cancelled([Running(), Crashed(), Scheduled(), Running()])
    assert not was_being_cancelled([Running(), Cancelling(), Cancelled(), Scheduled(), Running()])  # started anew
    assert not was_being_cancelled([Running()])
