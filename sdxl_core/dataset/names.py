"""Many file names in little memory."""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import chain
from typing import Any, Self

import numpy as np

NAMES_A_CHUNK = 4_096
FEW = 1 << 17  # names that may be Python strings for a moment, which sort a little faster: 12 MiB
WIDEST_BYTES = 48  # longer names are sorted as Python strings, which are hardly larger than a table of them


@dataclass(slots=True)
class Names:
    """Names joined as UTF-8 by some thousands: a few bytes a name more than they are written with.

    Names that are not valid UTF-8 are held as Python holds them in a `str`.
    """

    _chunks: list[bytes] = field(default_factory=list)
    _ends: list[int] = field(default_factory=list)  # how many names are in a chunk and in those before
    _open: list[str] = field(default_factory=list)  # not joined yet
    _widest: int = 0

    @classmethod
    def of(cls, names: Sequence[str]) -> Self:
        packed = cls()
        for start in range(0, len(names), NAMES_A_CHUNK):
            packed.add(names[start : start + NAMES_A_CHUNK])
        return packed

    def add(self, names: Sequence[str]) -> None:
        self._open += names
        if len(self._open) >= NAMES_A_CHUNK // 2:
            self._join_open()

    def _join_open(self) -> None:
        if self._open:
            self._add_chunk([name.encode("utf-8", "surrogateescape") for name in self._open])
            self._open.clear()

    def _add_chunk(self, names: Sequence[bytes]) -> None:
        self._ends.append(self._num_joined + len(names))
        self._chunks.append(b"\0".join(names))
        self._widest = max(self._widest, *map(len, names))

    @property
    def _num_joined(self) -> int:
        return self._ends[-1] if self._ends else 0

    def __len__(self) -> int:
        return self._num_joined + len(self._open)

    def __iter__(self) -> Iterator[str]:
        joined = (chunk.decode("utf-8", "surrogateescape").split("\0") for chunk in self._chunks)
        return chain(chain.from_iterable(joined), self._open)

    def has_last_part(self, part: str) -> bool:
        """Whether a name is `part`, or ends with it behind a slash."""
        wanted = part.encode("utf-8", "surrogateescape")
        chunks = [*self._chunks, "\0".join(self._open).encode("utf-8", "surrogateescape")]
        return any(before + wanted + b"\0" in b"\0%s\0" % chunk for chunk in chunks for before in (b"\0", b"/"))

    def part(self, start: int, stop: int) -> list[str]:
        """The names from `start` to before `stop`."""
        first = bisect_right(self._ends, start)
        last = bisect_left(self._ends, stop) + 1
        names = list(Names(self._chunks[first:last], self._ends[first:last]))
        if stop > self._num_joined:
            names += self._open
        before = self._ends[first - 1] if first else 0
        return names[start - before : stop - before]

    def in_order(self) -> Names:
        """The same names sorted by path parts: `b/1` comes before `b-c/1`, though "-" sorts before "/".

        Many names take their width in a table, not a Python string each.
        """
        self._join_open()
        if len(self) <= FEW or self._widest > WIDEST_BYTES:
            names = list(self)
            if any("/" in name for name in names):
                names.sort(key=_by_parts)
            else:
                names.sort()
            return Names.of(names)
        table = np.empty(len(self), f"S{self._widest}")
        self._fill(table)
        table.sort()
        ordered = Names()
        for start in range(0, len(table), NAMES_A_CHUNK):
            part = table[start : start + NAMES_A_CHUNK].tolist()
            ordered._add_chunk([name.replace(b"\0", b"/") for name in part])
        return ordered

    def _fill(self, table: np.ndarray[Any, Any]) -> None:
        """Names as they compare; a NUL ends a name only where no more than NULs follow."""
        start = 0
        for chunk in self._chunks:
            names = chunk.split(b"\0")
            if b"/" in chunk:
                names = [name.replace(b"/", b"\0") for name in names]
            table[start : start + len(names)] = names
            start += len(names)


def _by_parts(name: str) -> str:
    return name.replace("/", "\0")  # what sorts before all a name may have
