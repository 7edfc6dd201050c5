"""Copies of files that can be taken up again, and that are told apart from files of others."""

from __future__ import annotations

import errno
import filecmp
import os
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import orjson

from sdxl_core.errors import ConfigError, DataError
from sdxl_core.files import atomic_writer, digest_of, remove_stale_partials, write_atomic

SETTINGS_FILE = ".subset.json"
NOT_HERE = (errno.EXDEV, errno.ENOSYS, errno.EINVAL, errno.EOPNOTSUPP, errno.EPERM)

FileState = tuple[int, int]  # size in bytes, mtime_ns


class CopyFailed(OSError):
    """A source file that cannot be read. `str(error)`: for people."""


@dataclass(slots=True)
class Copies:
    """The copies below `out`, remembered in `out/.subset.json`.

    `written`: name -> the states (size, time) in which a file is known to be our copy. Before the first byte is copied
    it names everything that will be, so after a crash our own copies are still known as ours; afterwards it names what
    is there. Copies carry the time of their source, set before they take their name. They are not synced one by one:
    a copy that a power cut tore has that time but another size, and is made again.
    """

    source: Path
    out: Path
    settings: dict[str, str]
    written: dict[str, list[FileState]]
    finished: bool
    planned: dict[str, FileState]

    @classmethod
    def open(cls, source: Path, out: Path, *, settings: dict[str, str]) -> Copies:
        """Take up what an earlier run left. Raises: ConfigError: `out` belongs to other settings."""
        path = out / SETTINGS_FILE
        if not path.exists():
            return cls(source, out, settings, {}, True, {})
        try:
            old = orjson.loads(path.read_bytes())
            previous, finished = dict(old["settings"]), bool(old["finished"])
            written = {name: [(size, time) for size, time in states] for name, states in old["files"].items()}
        except (orjson.JSONDecodeError, KeyError, TypeError, ValueError, AttributeError) as error:
            raise DataError(
                f"{path}: cannot be understood, so it is unknown whose files these are. Choose another out folder."
            ) from error
        for name, value in settings.items():
            if previous.get(name) != value:
                raise ConfigError(
                    f"{out} holds a subset made with {name} = {previous.get(name)!r}; now it is {value!r}. "
                    f"Choose another out folder, or delete this one."
                )
        return cls(source, out, settings, written, finished, {})

    def begin(self, names: Sequence[str]) -> None:
        """Say which files there shall be: refuse to start if one is in the way, remove our copies of others.

        Raises: DataError: a file that is not ours, with another content; nothing was changed then.
        """
        for name in names:
            try:
                self.planned[name] = _state(self.source / name)
            except OSError:
                self.planned[name] = (-1, -1)  # copy() meets the same failure
        for name, state in self.planned.items():
            if not self._may_write(name, state):
                raise DataError(
                    f"{self.out / name} exists with another content than {self.source / name}; it is not overwritten. "
                    f"Remove it, or choose another out folder."
                )
        gone = [name for name in self.written if name not in self.planned and (self.out / name).exists()]
        stale = {name: _state(self.out / name) for name in gone}
        for name, state in stale.items():
            if state not in self.written[name]:
                raise DataError(
                    f"{self.out / name} belongs to a picture that the query no longer picks, but was changed since it "
                    f"was copied; it is not removed. Remove it, or choose another out folder."
                )
        if not self.finished:
            remove_stale_partials(self.out, name="*", recursive=True)
        planned = {name: [*self.written.get(name, []), state] for name, state in self.planned.items()}
        if any(planned[name][-1] not in self.written.get(name, []) for name in planned) or stale:
            self._remember({name: self.written[name] for name in stale} | planned, finished=False)
        for name in stale:
            (self.out / name).unlink(missing_ok=True)

    def copy(self, names: Sequence[str]) -> None:
        """Copy files that belong together, in this order; what is already there is left as it is.

        Raises: CopyFailed: one of them cannot be read; then none of them is there.   DiskFullError, DataError.
        """
        try:
            for name in names:
                self._copy(name)
        except CopyFailed:
            for name in names:
                copy = self.out / name
                if copy.exists() and _state(copy) in [*self.written.get(name, []), self.planned[name]]:
                    copy.unlink()
                del self.planned[name]
            raise

    def finish(self) -> None:
        """Remember what is there; written only if that is news."""
        there = {name: [state] for name, state in self.planned.items()}
        if not self.finished or there != self.written:
            self._remember(there, finished=True)

    def digest(self) -> str:
        """Identity of the copies: names, sizes and times."""
        return digest_of(*(f"{name}|{size}|{time}" for name, (size, time) in self.planned.items()))

    def _may_write(self, name: str, wanted: FileState) -> bool:
        """Whether nothing is at the copy's place, or a copy of ours, whole or torn, or the same content."""
        target = self.out / name
        try:
            there = _state(target)
        except (FileNotFoundError, NotADirectoryError):
            return not target.is_symlink() and self._folders_are_free(target)
        if not target.is_file():
            return False
        for size, time in self.written.get(name, []):
            if time == there[1] and there[0] <= size:  # ours: whole, or torn by a power cut
                return True
        return there == wanted or (there[0] == wanted[0] and self._same_content(name))

    def _same_content(self, name: str) -> bool:
        try:
            return filecmp.cmp(self.source / name, self.out / name, shallow=False)
        except OSError:
            return False

    def _folders_are_free(self, target: Path) -> bool:
        return all(parent.is_dir() or not os.path.lexists(parent) for parent in target.parents)

    def _copy(self, name: str) -> None:
        target = self.out / name
        try:
            if _state(target) == self.planned[name]:
                return
        except FileNotFoundError:
            pass
        try:
            with open(self.source / name, "rb") as reading, atomic_writer(target, sync=False) as writing:
                before = os.fstat(reading.fileno())
                num_bytes = _transfer(reading, writing)
                if num_bytes != before.st_size:
                    raise CopyFailed(f"{name} changed while it was copied ({before.st_size} -> {num_bytes} bytes)")
                os.utime(writing.fileno(), ns=(before.st_mtime_ns, before.st_mtime_ns))
        except CopyFailed:
            raise
        except OSError as error:
            raise CopyFailed(f"{name} cannot be read: {error.strerror}") from error
        self.planned[name] = (before.st_size, before.st_mtime_ns)

    def _remember(self, files: dict[str, list[FileState]], *, finished: bool) -> None:
        content = {"settings": self.settings, "finished": finished, "files": files}
        write_atomic(self.out / SETTINGS_FILE, orjson.dumps(content))
        self.written, self.finished = files, finished


def _state(path: Path) -> FileState:
    status = os.stat(path)
    return status.st_size, status.st_mtime_ns


def _transfer(reading: BinaryIO, writing: BinaryIO) -> int:
    """Copy a whole file, in the kernel where that works (shared blocks on btrfs and xfs). Returns bytes written."""
    num_bytes = 0
    if hasattr(os, "copy_file_range"):
        try:
            while copied := os.copy_file_range(reading.fileno(), writing.fileno(), 1 << 30):
                num_bytes += copied
        except OSError as error:
            if num_bytes or error.errno not in NOT_HERE:
                raise
    if not num_bytes:  # not offered here, or an empty file, or one of a file system that gives its size as 0
        shutil.copyfileobj(reading, writing, 1 << 20)
        writing.flush()
        num_bytes = writing.tell()
    return num_bytes
