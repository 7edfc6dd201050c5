"""A trainer process and the world: signals, the death of who launched it, and how its end is told."""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import orjson

from sdxl_core.files import write_atomic

WATCH_STDIN = "SDXL_FLOWS_WATCH_STDIN"
Status = Literal["running", "finished", "stopped", "failed"]


class StopSignal:
    """`received` is true once SIGTERM or SIGINT has come. The loop looks at it in each step, then saves and leaves."""

    def __init__(self) -> None:
        self.received = False
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._receive)

    def is_set(self) -> bool:
        """Has one come? Asked between two pictures, or two batches, that can as well be made later."""
        return self.received

    def _receive(self, number: int, frame: object) -> None:
        self.received = True


def end_with_launcher() -> None:
    """End this process when the launching one is gone, however it went: its end of our stdin is closed then.

    Does nothing unless `launch.launch_training` started us (a shell's or cron's stdin says nothing).
    """
    if os.environ.get(WATCH_STDIN) != "1":
        return

    def watch() -> None:
        while os.read(0, 4096):
            pass
        print("the launching process is gone: ending. The last saved state is kept.", file=sys.stderr, flush=True)
        os._exit(1)

    threading.Thread(target=watch, daemon=True, name="launcher watch").start()


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """How a trainer ended. `error`: class in sdxl_core.errors, `message`: its text; "" where nothing failed."""

    status: Status
    error: str = ""
    message: str = ""


def write_outcome(state: Path, outcome: Outcome) -> None:
    """Tell the launching process how the run ended."""
    write_atomic(state / "outcome.json", orjson.dumps(outcome), sync=False)


def read_outcome(state: Path) -> Outcome | None:
    """How the last trainer ended ("running": it was killed); None where none has begun."""
    try:
        return Outcome(**orjson.loads((state / "outcome.json").read_bytes()))
    except (FileNotFoundError, orjson.JSONDecodeError, TypeError):
        return None


class ProgressFile:
    """`state/progress.json` for whoever watches: step, total, loss, avr_loss; at most twice a second."""

    def __init__(self, state: Path, *, every_s: float = 0.5) -> None:
        self._path = state / "progress.json"
        self._every_s = every_s
        self._last_s = float("-inf")

    def write(self, *, step: int, total: int, loss: float, avr_loss: float, images_per_s: float) -> None:
        """What a run has reached after `step` of `total` steps."""
        now_s = time.monotonic()
        if now_s - self._last_s < self._every_s and step < total:
            return
        self._last_s = now_s
        record = {"step": step, "total": total, "loss": loss, "avr_loss": avr_loss, "images_per_s": images_per_s}
        write_atomic(self._path, orjson.dumps(record), sync=False)
