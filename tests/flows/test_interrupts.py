"""A Ctrl-C that somebody swallows is raised again; one that is on its way out is left alone."""

import os
import signal
import time
from contextlib import suppress

import pytest

from flows import interrupts


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(interrupts, "AGAIN_AFTER_S", 0.1)


def test_a_swallowed_interrupt_comes_again() -> None:
    swallowed = 0
    with pytest.raises(KeyboardInterrupt), interrupts.insistent_interrupts():
        try:
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(5)
        except KeyboardInterrupt:
            swallowed += 1
        time.sleep(5)  # somebody goes on as if nothing had been
    assert swallowed == 1


def test_what_an_interrupted_run_still_has_to_do_is_not_interrupted() -> None:
    done = []
    with pytest.raises(KeyboardInterrupt), interrupts.insistent_interrupts():
        try:
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(5)
        finally:
            time.sleep(0.5)  # a trainer saves its state
            done.append("saved")
    assert done == ["saved"]


def test_afterwards_signals_are_as_before() -> None:
    before = signal.getsignal(signal.SIGINT)
    with interrupts.insistent_interrupts():
        assert signal.getsignal(signal.SIGINT) is not before
    assert signal.getsignal(signal.SIGINT) is before


def test_no_repeat_comes_after_the_end(monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks that end while a repeat is under way."""
    kill, before = os.kill, signal.getsignal(signal.SIGINT)
    monkeypatch.setattr(interrupts, "AGAIN_AFTER_S", 0.001)

    def slow_kill(pid: int, number: int) -> None:
        time.sleep(0.002)
        kill(pid, number)

    monkeypatch.setattr(os, "kill", slow_kill)
    for number in range(200):
        with suppress(KeyboardInterrupt), interrupts.insistent_interrupts():
            with suppress(KeyboardInterrupt):
                signal.raise_signal(signal.SIGINT)
            time.sleep(number % 50 * 1e-4)  # the first repeat comes after 3 ms
        try:
            assert signal.getsignal(signal.SIGINT) is before
            time.sleep(0.004)
        except KeyboardInterrupt:
            pytest.fail(f"block {number} ended, and then came a repeat")
