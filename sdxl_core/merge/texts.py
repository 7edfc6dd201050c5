"""Read the text files of many pictures; files that the page cache has not are asked for ahead."""

from __future__ import annotations

import os
import time
from array import array
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from sdxl_core.dataset.text import UnreadableText, read_plain_texts, read_text

COLD_S = 50e-6  # a file that takes longer on average comes from a disk; from memory it takes about 5e-6
FILES_AT_ONCE = 64  # held open; more gain nothing
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
    there: Sequence[bool]
    states: array[int] | None = None
    _cold: int = 0  # windows that will be asked for ahead
    _num_read: int = 0
    _any: bool = field(init=False)

    def __post_init__(self) -> None:
        self._any = any(self.there)

    def read(self, keys: Sequence[str], failures: Failures) -> list[str | None]:
        """The texts of the next pictures, None where there is none; what cannot be read goes into `failures`."""
        names, there = keys, self.there[self._num_read : self._num_read + len(keys)]
        if not self._any:
            self._num_read += len(names)
            if self.states is not None:
                self.states.extend((-1, -1) * len(names))
            return [None] * len(names)
        base, extension = os.path.join(self.source, ""), self.extension
        paths = [base + key + extension if is_there else None for key, is_there in zip(names, there, strict=True)]
        start = time.perf_counter()
        texts: list[str | None] = []
        at_once = len(paths) if self._cold else FILES_AT_ONCE
        for first in range(0, len(paths), at_once):
            some = slice(first, first + at_once)
            texts += self._plain_texts(paths[some]) or self._texts(names[some], paths[some], failures)
        if self._cold:
            self._cold -= 1
        elif time.perf_counter() - start > COLD_S * len(paths):
            self._cold = COLD_WINDOWS
        return texts

    def _plain_texts(self, paths: Sequence[str | None]) -> list[str | None] | None:
        """The texts where every file that should be there is a plain text; else None."""
        wanted = [path for path in paths if path is not None]
        if self.states is not None and len(wanted) < len(paths):
            return None  # an odd folder
        read = read_plain_texts(wanted, ahead=bool(self._cold))
        if read is None or (self.states is None and None in read[0]):
            return None
        self._num_read += len(paths)
        texts, states = read
        if self.states is not None:
            self.states.extend(states)
        if len(wanted) < len(paths):
            rest = iter(texts)
            texts = [next(rest) if path is not None else None for path in paths]
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
                states.extend((-1, -1) if key not in failures else (0, 0))
        self._num_read += len(texts)
        return texts
