"""What shall be in a subset's folder, and where its bytes are."""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import NamedTuple

FileState = tuple[int, int]  # size in bytes, mtime_ns


class Wanted(NamedTuple):
    """One file to be.

    `name`: POSIX path below the subset's folder.   `path`: the file that holds its bytes: all of them, or
    `num_bytes` from `offset` on where `offset` >= 0 (a member of a tar).   `text`: its whole content, where that
    is in no file; it takes the time of `path`.
    """

    name: str
    path: str
    offset: int = -1
    num_bytes: int = -1
    text: bytes | None = None

    def state(self, status: os.stat_result) -> FileState:
        """Size and time that the placed file will have. Args: status: of `path`."""
        if self.text is not None:
            return len(self.text), status.st_mtime_ns
        return (status.st_size if self.offset < 0 else self.num_bytes), status.st_mtime_ns

    @property
    def is_whole_file(self) -> bool:
        return self.offset < 0 and self.text is None


@dataclass(frozen=True, slots=True)
class WantedGroup:
    """The files of one picture, the picture last: where it is, its texts are too."""

    key: str
    files: tuple[Wanted, ...]
