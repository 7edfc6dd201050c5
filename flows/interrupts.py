"""Ctrl-C that ends a run even where a library swallows it.

Python raises KeyboardInterrupt wherever the main thread happens to be: in a finalizer, or in code of a library that
catches everything, it is lost (seen: a run that went on to its end). Here it is raised again every few seconds until
the run is on its way out.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from queue import SimpleQueue
from types import FrameType

AGAIN_AFTER_S = 3.0


@contextmanager
def insistent_interrupts() -> Iterator[None]:
    """Within the block a SIGINT is repeated while no KeyboardInterrupt is being handled. For the main thread."""
    asked: SimpleQueue[None] = SimpleQueue()  # a signal in the middle of Event.set() would wait for itself in another
    ended = threading.Event()
    by_us = is_over = False

    def interrupted(number: int, frame: FrameType | None) -> None:
        nonlocal by_us
        asked.put(None)
        is_repeat, by_us = by_us, False
        if not (is_repeat and (is_over or _is_on_its_way_out(sys.exception()))):
            raise KeyboardInterrupt

    def insist() -> None:
        nonlocal by_us
        asked.get()
        while not ended.wait(AGAIN_AFTER_S) and not is_over:
            by_us = True
            os.kill(os.getpid(), signal.SIGINT)

    before = signal.signal(signal.SIGINT, interrupted)
    insisting = threading.Thread(target=insist, name="interrupts", daemon=True)
    insisting.start()
    try:
        yield
    finally:
        is_over = True  # first, and nothing can come between: a repeat that is under way is let pass
        try:
            ended.set()
            asked.put(None)
            insisting.join()  # else its last repeat could meet the handler of others
        finally:
            signal.signal(signal.SIGINT, before)


def _is_on_its_way_out(error: BaseException | None) -> bool:
    """Whether the exception that is being handled is, or came of, a KeyboardInterrupt."""
    while error is not None:
        if isinstance(error, KeyboardInterrupt):
            return True
        error = error.__cause__ or error.__context__
    return False
