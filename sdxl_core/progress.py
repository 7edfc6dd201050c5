"""How long work says where it is: one callable, drawn as a bar in a terminal or as an artifact in the browser."""

from __future__ import annotations

import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Protocol

_UNITS = {
    "train": "step",
    "catalog": "part",
    "merge-json": "file",
    "verify": "file",
    "convert": "file",
    "compact": "shard",
    "pack": "tar",
    "remove": "file",
}  # by stage; others count pictures


class Progress(Protocol):
    """Called with absolute numbers, as often as the work likes; whoever draws it limits the rate."""

    def __call__(self, stage: str, done: int, total: int, note: str = "") -> None: ...


def no_progress(stage: str, done: int, total: int, note: str = "") -> None:
    """Progress for callers that do not watch."""


@contextmanager
def terminal_progress() -> Iterator[Progress]:
    """A tqdm bar a stage on stderr; silent where stderr is not a terminal."""
    if not sys.stderr.isatty():
        yield no_progress
        return
    from tqdm import tqdm

    bars: dict[str, tqdm[None]] = {}

    def draw(stage: str, done: int, total: int, note: str = "") -> None:
        if stage not in bars:
            bars[stage] = tqdm(total=total, desc=stage, unit=_UNITS.get(stage, "img"), dynamic_ncols=True)
        bar = bars[stage]
        bar.total = total
        bar.set_postfix_str(note, refresh=False)
        bar.update(done - bar.n)

    try:
        yield draw
    finally:
        for bar in bars.values():
            bar.close()


class Summed:
    """Progress of shards that are worked on at once, as that of all of them. `total`: of all shards."""

    def __init__(self, progress: Progress, stage: str, total: int) -> None:
        self._progress, self._stage, self._total = progress, stage, total
        self._done = 0
        self._lock = threading.Lock()

    def part(self) -> Progress:
        """Progress for one shard, in any thread."""
        before = 0

        def tell(stage: str, done: int, total: int, note: str = "") -> None:
            nonlocal before
            with self._lock:
                self._done += done - before
                before = done
                self._progress(self._stage, self._done, self._total, note)

        return tell
