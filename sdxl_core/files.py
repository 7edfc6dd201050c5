"""Files that exist whole or not at all: write beside, sync, rename."""

from __future__ import annotations

import ctypes
import errno
import fnmatch
import hashlib
import os
import re
import sys
import threading
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO

from sdxl_core.errors import DataError, DiskFullError
from sdxl_core.processes import process_start

if TYPE_CHECKING:
    from typing_extensions import Buffer

MAX_PIECES = 1024  # Linux takes no more in one writev
NEW_FILE = os.O_WRONLY | os.O_CREAT | os.O_TRUNC
MANY_FILES = 16
SYNC_FILE_RANGE_WRITE = 2  # linux/fs.h
WHOLE_SYNC = (0xEF53, 0x58465342, 0x9123683E, 0xF2F52010, 0x01021994)  # ext, xfs, btrfs, f2fs, tmpfs (linux/magic.h)
MAX_NAME_BYTES = 200  # file systems allow 255; a partial file's name is longer than the name it takes


@contextmanager
def disk_errors(path: Path) -> Iterator[None]:
    """Turn a full disk or a missing permission into an error that says what to do; other OSErrors pass."""
    try:
        yield
    except OSError as error:
        _raise_disk_error(path, error)
        raise


def _raise_disk_error(path: Path, error: OSError) -> None:
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        raise DiskFullError(
            f"{path}: the disk is full ({error.strerror}). Everything finished so far is kept; "
            f"free some space and run the same command again, it continues where it stopped."
        ) from error
    if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
        raise DataError(
            f"{path}: cannot be written ({error.strerror}). Choose another out folder or change its permissions."
        ) from error


def partial_path(path: Path) -> str:
    """Where this thread writes a file before it takes its name `path`."""
    folder, separator, name = str(path).rpartition(os.sep)
    if len(name) > MAX_NAME_BYTES // 4 and len(os.fsencode(name)) > MAX_NAME_BYTES:
        name = digest_of(name)
    return f"{folder}{separator}.{name}.{os.getpid()}-{threading.get_ident()}.partial"


@contextmanager
def atomic_writer(path: Path, *, sync: bool = True) -> Iterator[BinaryIO]:
    """Open a binary file that takes its name `path` only when the block ends without an error.

    Args:   path: final name; its folder is created.   sync: fsync file and folder before returning (else the
            caller syncs a whole group, see `sync_files`).
    Raises: DiskFullError, DataError (no permission).
    """
    partial = Path(partial_path(path))
    with disk_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            with open(partial, "wb") as file:
                yield file
                file.flush()
                if sync:
                    os.fsync(file.fileno())
            os.replace(partial, path)
        finally:
            partial.unlink(missing_ok=True)
        if sync:
            sync_folder(path.parent)


def write_atomic(path: Path, data: bytes | Iterable[bytes], *, sync: bool = True) -> None:
    """Write `data` (bytes or an iterator of pieces) to `path`, whole or not at all. Raises as `atomic_writer`."""
    with atomic_writer(path, sync=sync) as file:
        for piece in (data,) if isinstance(data, bytes) else data:
            file.write(piece)


def write_vectored(path: Path, pieces: Sequence[Buffer]) -> None:
    """Write pieces to `path` with as few calls as can be, whole or not at all; the caller syncs (`sync_files`).

    Raises: as `atomic_writer`.
    """
    partial = partial_path(path)
    try:
        try:
            handle = os.open(partial, NEW_FILE, 0o666)
        except FileNotFoundError:
            path.parent.mkdir(parents=True, exist_ok=True)
            handle = os.open(partial, NEW_FILE, 0o666)
        try:
            try:
                for start in range(0, len(pieces), MAX_PIECES):
                    _write_all(handle, pieces[start : start + MAX_PIECES])
            finally:
                os.close(handle)
            os.replace(partial, path)
        except BaseException:
            with suppress(FileNotFoundError):
                os.unlink(partial)
            raise
    except OSError as error:
        _raise_disk_error(path, error)
        raise


def _write_all(handle: int, pieces: Sequence[Buffer]) -> None:
    """One writev, and what it leaves unwritten (a nearly full disk, a signal) piece by piece."""
    written = os.writev(handle, pieces)
    if written == sum([memoryview(piece).nbytes for piece in pieces]):
        return
    for piece in pieces:
        view = memoryview(piece).cast("B")
        if written >= len(view):
            written -= len(view)
            continue
        view, written = view[written:], 0
        while len(view):
            view = view[os.write(handle, view) :]


def remove_stale_partials(folder: Path, *, name: str, recursive: bool = False) -> None:
    """Remove what killed processes of this machine left of `atomic_writer`'s files.

    Args:   name: pattern of the final file names ("*": all of them).   recursive: in sub-folders too.
    """
    named = re.compile(fnmatch.translate(f".{name}.*-*.partial")).match
    folders = [str(folder)]
    while folders:
        with suppress(FileNotFoundError, NotADirectoryError, PermissionError), os.scandir(folders.pop()) as entries:
            for entry in entries:  # one at a time: there may be millions
                if recursive and entry.is_dir(follow_symlinks=False):
                    folders.append(entry.path)
                elif entry.name.endswith(".partial") and named(entry.name):
                    pid = entry.name.rsplit(".", 2)[1].partition("-")[0]
                    if pid.isdecimal() and process_start(int(pid)) is None:
                        Path(entry.path).unlink(missing_ok=True)


@contextmanager
def folder_guard(folder: Path) -> Iterator[None]:
    """Hold a folder for a moment: reading and replacing one of its files is one step among all that do it under this.

    Not to be nested. Without effect on Windows and where the file system knows no flock.
    """
    guard = -1
    with suppress(ImportError, OSError):
        import fcntl

        guard = os.open(folder, os.O_RDONLY)
        fcntl.flock(guard, fcntl.LOCK_EX)
    try:
        yield
    finally:
        if guard >= 0:
            os.close(guard)


def start_writing(file: BinaryIO) -> None:
    """Have the system begin to write what is in a file to the disk, without waiting: the sync at its end is short then.

    sync_file_range(2), which is for Linux alone; elsewhere without effect.
    """
    if sys.platform.startswith("linux"):
        file.flush()
        _libc().sync_file_range(file.fileno(), ctypes.c_int64(0), ctypes.c_int64(0), SYNC_FILE_RANGE_WRITE)


@cache
def _libc() -> ctypes.CDLL:
    return ctypes.CDLL(None, use_errno=True)


def sync_folder(folder: Path) -> None:
    """fsync a folder, so that renames in it survive a power cut (no-op where folders cannot be opened)."""
    try:
        handle = os.open(folder, os.O_RDONLY)
    except (PermissionError, IsADirectoryError):  # Windows
        return
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def sync_files(paths: Iterable[Path]) -> None:
    """Bring many finished files, and that they have their names, to the disk: one commit group.

    Many files of a local file system are synced with it as a whole, which costs a fifth of doing it one by one.
    """
    by_folder: dict[Path, list[Path]] = {}
    for path in paths:
        by_folder.setdefault(path.parent, []).append(path)
    if sum(map(len, by_folder.values())) >= MANY_FILES:
        synced: set[int] = set()
        for folder in list(by_folder):
            device = os.stat(folder).st_dev
            if device in synced or _sync_file_system(folder):
                synced.add(device)
                del by_folder[folder]
    for folder, files in by_folder.items():
        for path in files:
            with disk_errors(path), open(path, "rb+") as file:
                os.fsync(file.fileno())
        sync_folder(folder)


def _sync_file_system(folder: Path) -> bool:
    """syncfs, where it is known to write everything and to tell of failures; False where it is not."""
    if not sys.platform.startswith("linux") or _kernel() < (5, 8):  # before, syncfs kept failures to itself
        return False
    libc = _libc()
    told = (ctypes.c_long * 32)()  # struct statfs, whose first field is the kind
    with disk_errors(folder):
        handle = os.open(folder, os.O_RDONLY)
        try:
            if libc.fstatfs(handle, ctypes.byref(told)) or told[0] not in WHOLE_SYNC:
                return False
            if libc.syncfs(handle):
                raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()), str(folder))
        finally:
            os.close(handle)
    return True


def _kernel() -> tuple[int, ...]:
    return tuple(int(number) for number in re.findall(r"\d+", os.uname().release)[:2])


def sha256_file(path: Path) -> str:
    """SHA-256 of a file's content, 64 hex digits."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def digest_of(*parts: str | bytes | int) -> str:
    """SHA-256 (64 hex digits) over a sequence of values; lengths are hashed too, so parts cannot run together."""
    return digest_of_all(parts)


def digest_of_all(parts: Iterable[str | bytes | int]) -> str:
    """As `digest_of`, of values that come one by one."""
    digest = hashlib.sha256()
    for part in parts:
        data = part if isinstance(part, bytes) else str(part).encode("utf-8", "surrogateescape")
        digest.update(len(data).to_bytes(8, "little"))
        digest.update(data)
    return digest.hexdigest()
