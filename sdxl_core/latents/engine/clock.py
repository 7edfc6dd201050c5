"""Seconds of work by stage, gathered from several threads."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

from sdxl_core.latents.engine.records import STAGES, EngineReport


class Clock:
    """Adds up what each stage works, waiting left out. `decode_threads`: what decoding's seconds are shared by."""

    def __init__(self, decode_threads: int) -> None:
        self._started = time.perf_counter()
        self._lanes = dict.fromkeys(STAGES, 1) | {"decode": decode_threads}
        self._seconds = dict.fromkeys(STAGES, 0.0)
        self._lock = threading.Lock()

    def add(self, stage: str, seconds: float) -> None:
        with self._lock:
            self._seconds[stage] += seconds

    @contextmanager
    def working(self, stage: str) -> Iterator[None]:
        """Count the time that the block takes."""
        started = time.perf_counter()
        try:
            yield
        finally:
            self.add(stage, time.perf_counter() - started)

    def report(self, *, num_encoded: int, num_rejected: int) -> EngineReport:
        wall = max(time.perf_counter() - self._started, 1e-9)
        busy = {stage: round(self._seconds[stage] / self._lanes[stage] / wall, 4) for stage in STAGES}
        return EngineReport(
            num_encoded=num_encoded,
            num_rejected=num_rejected,
            wall_s=wall,
            seconds={stage: round(seconds, 3) for stage, seconds in self._seconds.items()},
            busy=busy,
            bound_by=max(STAGES, key=busy.__getitem__),
            images_per_s=num_encoded / wall,
        )
