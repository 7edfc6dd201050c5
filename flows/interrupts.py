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
from types import FrameType

AGAIN_AFTER_S = 3.0


@contextmanager
def insistent_interrupts() -> Iterator[None]:
    """Within the block a SIGINT is repeated while no KeyboardInterrupt is being handled. For the main thread."""
    ended, asked, by_us = threading.Event(), threading.Event(), threading.Event()

    def interrupted(number: int, frame: FrameType | None) -> None:
        asked.set()
        if by_us.is_set():
            by_us.clear()
            if _is_on_its_way_out(sys.exception()):
                return
        raise KeyboardInterrupt

    def insist() -> None:
        asked.wait()
        while not ended.wait(AGAIN_AFTER_S):
            by_us.set()
            os.kill(os.getpid(), signal.SIGINT)

    before = signal.signal(signal.SIGINT, interrupted)
    threading.Thread(target=insist, name="interrupts", daemon=True).start()
    try:
        yield
    finally:
        ended.set()
        asked.set()
        signal.signal(signal.SIGINT, before)


def _is_on_its_way_out(error: BaseException | None) -> bool:
    """Whether the exception that is being handled is, or came of, a KeyboardInterrupt."""
    while error is not None:
        if isinstance(error, KeyboardInterrupt):
            return True
        error = error.__cause__ or error.__context__
    return False
