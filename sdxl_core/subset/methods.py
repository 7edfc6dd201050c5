"""How one file gets its place: copied, or linked in one of three ways. Whole and under its name, or not at all."""

from __future__ import annotations

import errno
import hashlib
import os
import shutil
import stat
import threading
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import BinaryIO

from sdxl_core.errors import ConfigError
from sdxl_core.files import atomic_writer, disk_errors
from sdxl_core.subset.wanted import FileState, Wanted

NOT_HERE = (errno.EXDEV, errno.ENOSYS, errno.EINVAL, errno.EOPNOTSUPP, errno.EPERM, errno.ENOTTY)
FICLONE = 0x40049409  # linux/fs.h: share the blocks of another file
BLOCK_BYTES = 1 << 20


class PlacingFailed(OSError):
    """One file that cannot be placed. `str(error)`: for people."""


def copy(wanted: Wanted, target: str) -> tuple[FileState, str]:
    """Copy, then read the copy back. Returns its state and the SHA-256 of its content.

    The copy carries the time of its source, set before it takes its name. It is not synced: see `Placed`.
    Raises: PlacingFailed: the source cannot be read, or what was written is not what was read.   DiskFullError.
    """
    with open(wanted.path, "rb") as reading, atomic_writer(Path(target), sync=False) as writing:
        before = os.fstat(reading.fileno())
        size, _ = wanted.state(before)
        if wanted.is_whole_file:
            num_bytes = _transfer(reading, writing)
            reading.seek(0)
            digest = hashlib.file_digest(reading, "sha256").hexdigest()
        else:
            num_bytes, digest = _write_part(wanted, reading, writing)
        if num_bytes != size:
            raise PlacingFailed(f"{wanted.name} changed while it was copied ({size} -> {num_bytes} bytes)")
        with open(writing.name, "rb") as written:
            if hashlib.file_digest(written, "sha256").hexdigest() != digest:
                raise PlacingFailed(f"{wanted.name}: the copy read back is not what {wanted.path} holds")
        os.utime(writing.fileno(), ns=(before.st_mtime_ns, before.st_mtime_ns))
    return (size, before.st_mtime_ns), digest


def hardlink(wanted: Wanted, target: str) -> tuple[FileState, str]:
    """Give the file a second name. Returns its state and inode number. Raises: PlacingFailed, ConfigError."""
    source = wanted.path
    _named(source, target, os.link, how="hardlink")
    there = os.lstat(target)
    if stat.S_ISLNK(there.st_mode):  # some systems link the symbolic link itself
        os.unlink(target)
        _named(os.path.realpath(source), target, os.link, how="hardlink")
        there = os.lstat(target)
    return (there.st_size, there.st_mtime_ns), str(there.st_ino)


def symlink(wanted: Wanted, target: str) -> tuple[FileState, str]:
    """Put a link to the file's absolute path. Returns the file's state and that path. Raises: PlacingFailed."""
    there = os.stat(wanted.path)
    _named(wanted.path, target, os.symlink, how="symlink")
    return (there.st_size, there.st_mtime_ns), wanted.path


def reflink(wanted: Wanted, target: str) -> tuple[FileState, str]:
    """Make a file of its own that shares its blocks until one of the two is changed. Raises: as `hardlink`.

    System calls only, no file objects: they cost more than the clone (benchmarks/subset_copy.md).
    """
    reading = os.open(wanted.path, os.O_RDONLY)
    try:
        before = os.fstat(reading)
        partial = _partial(target)
        try:
            _clone(reading, before, partial, wanted.name)
            os.replace(partial, target)
        except BaseException as error:
            with suppress(FileNotFoundError):
                os.unlink(partial)
            if not isinstance(error, OSError) or isinstance(error, PlacingFailed):
                raise
            if error.errno in NOT_HERE:
                raise _refused("reflink", wanted.path, target, error) from error
            with disk_errors(Path(target)):
                raise
    finally:
        os.close(reading)
    return (before.st_size, before.st_mtime_ns), ""


def _clone(reading: int, before: os.stat_result, partial: str, name: str) -> None:
    """Args:   before: of the open file `reading`.   name: for the error."""
    import fcntl  # not on Windows

    writing = os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)
    try:
        fcntl.ioctl(writing, FICLONE, reading)
        os.utime(writing, ns=(before.st_mtime_ns, before.st_mtime_ns))
        if os.fstat(reading).st_size != before.st_size:
            raise PlacingFailed(f"{name} changed while it was placed")
    finally:
        os.close(writing)


def _partial(target: str) -> str:
    return os.path.join(os.path.dirname(target), f".subset.{os.getpid()}-{threading.get_ident()}.partial")


METHODS: dict[str, Callable[[Wanted, str], tuple[FileState, str]]] = {
    "copy": copy,
    "hardlink": hardlink,
    "reflink": reflink,
    "symlink": symlink,
}


def place(how: str, wanted: Wanted, target: str) -> tuple[FileState, str]:
    """Place one file; texts that are in no file are written whatever `how` is.

    Returns: its state, and by what it will be known again as ours: see the methods.
    Raises: PlacingFailed.   ConfigError: links are not possible between these two places.   DiskFullError, DataError.
    """
    try:
        return (METHODS[how] if wanted.text is None else copy)(wanted, target)
    except PlacingFailed:
        raise
    except OSError as error:
        raise PlacingFailed(f"{wanted.name} cannot be read: {error.strerror}") from error


def try_link(how: str, source: str, out: Path) -> None:
    """Make one link to `source` where `out` will be and remove it, before anything else is made.

    Raises: ConfigError: such links are not possible there, with what is.   DataError: no permission.
    """
    if how == "copy":
        return
    parent = next(folder for folder in (out, *out.absolute().parents) if folder.is_dir())
    trial = str(parent / f".sdxl-flows-trial.{os.getpid()}-0.partial")
    try:
        METHODS[how](Wanted(name=os.path.basename(source), path=source), trial)
    except PlacingFailed:
        return  # this one file is at fault; placing meets it again
    except FileNotFoundError:
        return
    finally:
        with suppress(FileNotFoundError):
            os.unlink(trial)


def _named(source: str, target: str, link: Callable[[str, str], None], *, how: str) -> None:
    """Make a link under its final name; what is there (ours, as the caller knows) is replaced at once."""
    try:
        try:
            link(source, target)
        except FileExistsError:
            partial = _partial(target)
            link(source, partial)
            os.replace(partial, target)
    except OSError as error:
        if error.errno in NOT_HERE:
            raise _refused(how, source, target, error) from error
        with disk_errors(Path(target)):
            raise


def _refused(how: str, source: str, target: str, error: OSError) -> ConfigError:
    others = {"hardlink": "symlink (needs the source to stay)", "reflink": "hardlink (one file system)"}
    return ConfigError(
        f"how = {how}: {source} cannot be linked to {os.path.dirname(target)} that way ({error.strerror}): "
        f"{'the two are on different file systems' if error.errno == errno.EXDEV else 'not offered there'}. "
        f"Choose how = copy, {others.get(how, 'hardlink (one file system)')}, or manifest (copies nothing)."
    )


def _write_part(wanted: Wanted, reading: BinaryIO, writing: BinaryIO) -> tuple[int, str]:
    """Write a text, or a member of a tar. Returns bytes written and the SHA-256 of what was read."""
    digest, num_bytes = hashlib.sha256(), 0
    if wanted.text is not None:
        digest.update(wanted.text)
        num_bytes = writing.write(wanted.text)
    else:
        reading.seek(wanted.offset)
        while num_bytes < wanted.num_bytes and (block := reading.read(min(BLOCK_BYTES, wanted.num_bytes - num_bytes))):
            digest.update(block)
            num_bytes += writing.write(block)
    writing.flush()
    return num_bytes, digest.hexdigest()


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
        shutil.copyfileobj(reading, writing, BLOCK_BYTES)
        writing.flush()
        num_bytes = writing.tell()
    return num_bytes
