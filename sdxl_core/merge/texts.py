"""Read the text files of many pictures; files that the page cache has not are asked for ahead."""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

from sdxl_core.dataset.text import UnreadableText, read_text

COLD_S = 50e-6  # a file that takes longer on average comes from a disk; from memory it takes about 5e-6
COLD_WINDOWS = 16  # how long files are asked for ahead before it is tried without

Failures = dict[str, UnreadableText | OSError]


@dataclass(slots=True)
class Texts:
    """The text files of pictures with one extension.

    `there`: which pictures have one, in the pictures' order.   `states`: not None: receives size and mtime_ns of each
    picture's text in that order as they were when it was read; -1, -1 where there is none, 0, 0 where it cannot be
    opened.
    """

    source: Path
    extension: str
    there: list[bool]
    states: list[int] | None = None
    _cold: int = 0  # windows that will be asked for ahead
    _num_read: int = 0
    _any: bool = field(init=False)

    def __post_init__(self) -> None:
        self._any = any(self.there)

    def read(self, keys: Sequence[str], window: slice, failures: Failures) -> list[str | None]:
        """The texts of a window of all pictures, None where there is none; what cannot be read goes into `failures`.

        Args:   keys: of all pictures.   window: contiguous; windows are read in order, each once.
        """
        names, there = keys[window], self.there[window]
        if not self._any:
            self._num_read += len(names)
            if self.states is not None:
                self.states += (-1, -1) * len(names)
            return [None] * len(names)
        base, extension = os.path.join(self.source, ""), self.extension
        paths = [base + key + extension if is_there else None for key, is_there in zip(names, there, strict=True)]
        start = time.perf_counter()
        if self._cold:
            _ask_for(paths)
        texts = self._texts(names, paths, failures)
        if self._cold:
            self._cold -= 1
        elif time.perf_counter() - start > COLD_S * len(paths):
            self._cold = COLD_WINDOWS
        return texts

    def _texts(self, keys: Sequence[str], paths: Sequence[str | None], failures: Failures) -> list[str | None]:
        texts: list[str | None] = []
        states = self.states
        for key, path in zip(keys, paths, strict=True):
            if path is not None:
                try:
                    texts.append(read_text(path, states))
                    continue
                except FileNotFoundError as error:
                    if states is None:
                        failures.setdefault(key, error)
                except (UnreadableText, OSError) as error:
                    failures.setdefault(key, error)
            texts.append(None)
            if states is not None and len(states) < 2 * (self._num_read + len(texts)):
                states += (-1, -1) if key not in failures else (0, 0)
        self._num_read += len(texts)
        return texts


def _ask_for(paths: Sequence[str | None]) -> None:
    """Have the system read files, without waiting for it."""
    if not hasattr(os, "posix_fadvise"):
        return
    for path in paths:
        if path is not None:
            with suppress(OSError):
                handle = os.open(path, os.O_RDONLY)
                try:
                    os.posix_fadvise(handle, 0, 0, os.POSIX_FADV_WILLNEED)
                finally:
                    os.close(handle)
