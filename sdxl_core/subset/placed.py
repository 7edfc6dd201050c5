"""The files of one shard in a subset's folder: told apart from files of others, placed, and known again."""

from __future__ import annotations

import filecmp
import hashlib
import os
import stat
from collections.abc import Collection, Iterable
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

from sdxl_core.errors import ConfigError, DataError
from sdxl_core.files import disk_errors, sha256_file
from sdxl_core.subset.ledger import Ledger
from sdxl_core.subset.methods import PlacingFailed, place
from sdxl_core.subset.wanted import FileState, Wanted, WantedGroup

UNREADABLE: FileState = (-1, -1)
SHA256_DIGITS = 64


@dataclass(slots=True)
class Placed:
    """The files of one shard below `out`. `planned`: name -> the state it shall have.

    Copies are not synced one by one: a copy that a power cut tore has its time but another size, or, having no mark
    yet, is read and compared; it is made again.
    About 1 kB a file of the shard is held.
    """

    out: Path
    how: str
    ledger: Ledger
    planned: dict[str, FileState] = field(default_factory=dict)
    _folders: set[str] = field(default_factory=set)  # below `out`, that are there

    def plan(self, groups: Iterable[WantedGroup]) -> None:
        """Say which files there shall be; nothing is changed.

        Raises: ConfigError: such links are not possible.   DataError: a file of others is in the way.
        """
        for group in groups:
            for wanted in group.files:
                state = state_of(wanted, self.how)
                self.planned[wanted.name] = state
                if not self._may_write(wanted, state):
                    source = wanted.path if wanted.is_whole_file else f"what {wanted.path} has for it"
                    raise DataError(
                        f"{self.out / wanted.name} exists with another content than {source}; it is not overwritten. "
                        f"Remove it, or choose another out folder."
                    )

    def begin(self) -> None:
        """Remember what will be placed, before the first file is."""
        written = self.ledger.written
        if all(state in written.get(name, ()) for name, state in self.planned.items()):
            return
        for name, state in self.planned.items():
            written[name] = (*written.get(name, ()), state)
        self.ledger.finished = False
        self.ledger.write()

    def place(self, group: WantedGroup) -> None:
        """Place the files of a group in their order; what is already there is left as it is.

        Raises: PlacingFailed: one of them cannot be read; then none of them is there.   DiskFullError, DataError.
        """
        try:
            for wanted in group.files:
                self._place(wanted)
        except PlacingFailed as error:
            for wanted in group.files:
                self._take_back(wanted.name)
            self.ledger.failed.append((group.key, str(error)))
            raise
        self.ledger.num_kept += 1

    def finish(self) -> None:
        """Remember what is there."""
        self.ledger.written = {name: (state,) for name, state in self.planned.items()}
        self.ledger.marks = {name: mark for name, mark in self.ledger.marks.items() if name in self.planned}
        self.ledger.finished = True
        self.ledger.write()

    def _may_write(self, wanted: Wanted, state: FileState) -> bool:
        """Whether nothing is at the file's place, or one of ours, whole or torn, or the same content."""
        target = f"{self.out}/{wanted.name}"
        try:
            status = os.lstat(target)
        except FileNotFoundError:
            return True
        except NotADirectoryError as error:
            raise DataError(
                f"{os.path.dirname(target)} exists and is no folder, but files of the subset belong into it. "
                f"Remove it, or choose another out folder."
            ) from error
        if stat.S_ISLNK(status.st_mode):
            if os.readlink(target) in (wanted.path, self.ledger.marks.get(wanted.name)):
                return True
            if not os.path.isfile(target):
                return False
            status = os.stat(target)
        if not stat.S_ISREG(status.st_mode):
            return False
        there = status.st_size, status.st_mtime_ns
        for size, time in self.ledger.written.get(wanted.name, ()):
            if time == there[1] and there[0] <= size:  # ours: whole, or torn by a power cut
                return True
        return self._same_file(wanted) or (there[0] == state[0] and self._same_content(wanted))

    def _same_file(self, wanted: Wanted) -> bool:
        try:
            return wanted.is_whole_file and os.path.samefile(wanted.path, self.out / wanted.name)
        except OSError:
            return False

    def _same_content(self, wanted: Wanted) -> bool:
        target = self.out / wanted.name
        try:
            if wanted.text is not None:
                return target.read_bytes() == wanted.text
            if wanted.offset < 0:
                return filecmp.cmp(wanted.path, target, shallow=False)
            with open(wanted.path, "rb") as tar:
                tar.seek(wanted.offset)
                return target.read_bytes() == tar.read(wanted.num_bytes)
        except OSError:
            return False

    def _place(self, wanted: Wanted) -> None:
        name = wanted.name
        if self._is_placed(wanted):
            return
        folder = name.rpartition("/")[0]
        if folder not in self._folders:
            with disk_errors(self.out / folder):
                (self.out / folder).mkdir(parents=True, exist_ok=True)
            self._folders.add(folder)
        self.planned[name], mark = place(self.how, wanted, f"{self.out}/{name}")
        if mark:
            self.ledger.marks[name] = mark

    def _is_placed(self, wanted: Wanted) -> bool:
        """Whether the file stands as planned. A copy without a mark is compared with its source and gets one."""
        name, target = wanted.name, self.out / wanted.name
        try:
            status = os.lstat(target)
        except FileNotFoundError:
            return False
        is_link = stat.S_ISLNK(status.st_mode)
        if self.how == "symlink" and wanted.text is None:
            if is_link and os.readlink(target) == wanted.path and target.exists():
                self.ledger.marks[name] = wanted.path
                return True
            return False
        if self.how == "hardlink" and wanted.text is None:
            if not is_link and self._same_file(wanted):
                self.ledger.marks[name] = str(status.st_ino)
                return True
            return False
        if is_link or (status.st_size, status.st_mtime_ns) != self.planned[name]:
            return False
        if name not in self.ledger.marks:
            if not self._same_content(wanted):
                return False
            self.ledger.marks[name] = sha256_file(target)
        return wanted.text is None or self.ledger.marks[name] == hashlib.sha256(wanted.text).hexdigest()

    def _take_back(self, name: str) -> None:
        path = self.out / name
        with suppress(FileNotFoundError):
            if path.is_symlink() or _state(path) in [*self.ledger.written.get(name, ()), self.planned[name]]:
                path.unlink()
        self.ledger.marks.pop(name, None)
        del self.planned[name]


def state_of(wanted: Wanted, how: str) -> FileState:
    """Size and time that a file shall have, as its source is now; `UNREADABLE`: placing meets the same failure.

    Raises: ConfigError: it has no file of its own to link.
    """
    if wanted.offset >= 0 and how != "copy":
        raise ConfigError(
            f"how = {how}: {wanted.name} lies inside {wanted.path}, which has no file of its own to link. "
            f"Choose how = copy (takes it out of the tar), or manifest (says where it is; nothing is copied)."
        )
    try:
        return wanted.state(os.stat(wanted.path))
    except OSError:
        return UNREADABLE


def all_stand(ledger: Ledger, out: Path) -> bool:
    """Whether every file of a finished shard is there as it was left; contents are not read."""
    return all(_stands(f"{out}/{name}", states[0], ledger.marks.get(name)) for name, states in ledger.written.items())


def is_ours(path: Path, states: Collection[FileState], mark: str | None) -> bool:
    """Whether a file is still as one of our runs left it. Args: states, mark: what the ledger knows of it."""
    if path.is_symlink():
        return mark is None or os.readlink(path) == mark
    return _is_inode(mark, path.stat()) or _state(path) in states


def _stands(path: str, state: FileState, mark: str | None) -> bool:
    try:
        status = os.lstat(path)
        if stat.S_ISLNK(status.st_mode):
            return mark is not None and os.readlink(path) == mark and _state(path) == state
    except OSError:
        return False
    if (status.st_size, status.st_mtime_ns) != state or (mark is not None and os.path.isabs(mark)):
        return False
    return mark is None or len(mark) == SHA256_DIGITS or _is_inode(mark, status)


def _is_inode(mark: str | None, status: os.stat_result) -> bool:
    return mark == str(status.st_ino)


def _state(path: str | Path) -> FileState:
    status = os.stat(path)
    return status.st_size, status.st_mtime_ns
