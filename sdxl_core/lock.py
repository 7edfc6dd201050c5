"""One worker an output folder: a lock file with a heartbeat, which a killed holder cannot leave locked.

On the holder's own machine a dead holder is known at once (process id and start time); from another machine (a network
file system) a lock counts as abandoned when its heartbeat is a minute old by the file system's own clock.
"""

from __future__ import annotations

import os
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path

import orjson

from sdxl_core.errors import LockedError
from sdxl_core.files import disk_errors
from sdxl_core.processes import process_start

HEARTBEAT_S = 10.0
ABANDONED_AFTER_S = 60.0
LOCK_NAME = ".lock"

_held: dict[Path, int] = {}
_held_guard = threading.Lock()


@contextmanager
def output_lock(folder: Path, *, purpose: str, wait_s: float = 0.0) -> Iterator[None]:
    """Hold the folder while the block runs; nested use by the same process is free.

    Args:   purpose: what the holder does, for the message others get.   wait_s: how long to wait for another holder.
    Raises: LockedError: somebody else holds it, with who and since when.
    """
    key = folder.resolve()
    with _held_guard:
        nested = _held.get(key, 0)
        if nested:
            _held[key] = nested + 1
    if not nested:
        path = key / LOCK_NAME
        _acquire(path, purpose, wait_s)
        with _held_guard:
            _held[key] = 1
        stop = threading.Event()
        threading.Thread(target=_beat, args=(path, stop), daemon=True).start()
    try:
        yield
    finally:
        with _held_guard:
            _held[key] -= 1
        if not nested:
            stop.set()
            path.unlink(missing_ok=True)


def _acquire(path: Path, purpose: str, wait_s: float) -> None:
    deadline = time.monotonic() + wait_s
    content = orjson.dumps(
        {
            "host": socket.gethostname(),
            "boot": _boot_id(),
            "pid": os.getpid(),
            "started": process_start(os.getpid()),
            "purpose": purpose,
            "since": datetime.now(UTC).isoformat(timespec="seconds"),
        }
    )
    with disk_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
    while not _create(path, content):
        holder = _read(path)
        if holder is None:
            continue
        if _is_abandoned(path, holder):
            _take_away(path)
            continue
        if time.monotonic() >= deadline:
            raise LockedError(
                f"{path.parent}: {holder.get('purpose')} is working on it since {holder.get('since')} (process "
                f"{holder.get('pid')} on {holder.get('host')}). Wait until it has finished, or end it; if it is surely "
                f"gone, delete {path}."
            )
        time.sleep(min(1.0, max(0.05, deadline - time.monotonic())))


def _create(path: Path, content: bytes) -> bool:
    """Create the lock file with its content in one step (a link to a finished file), False where there is one."""
    draft = path.with_name(f"{path.name}.{socket.gethostname()}.{os.getpid()}.{threading.get_ident()}")
    with disk_errors(path):
        draft.write_bytes(content)
        try:
            os.link(draft, path)
        except FileExistsError:
            return False
        finally:
            draft.unlink(missing_ok=True)
    return True


def _read(path: Path) -> dict[str, object] | None:
    try:
        holder = orjson.loads(path.read_bytes())
    except FileNotFoundError:
        return None
    except orjson.JSONDecodeError:
        return {}
    return holder if isinstance(holder, dict) else {}


def _is_abandoned(path: Path, holder: dict[str, object]) -> bool:
    if holder.get("host") == socket.gethostname():
        pid = holder.get("pid")
        if holder.get("boot") != _boot_id() or not isinstance(pid, int):
            return True
        return process_start(pid) != holder.get("started")
    try:
        return _file_system_now(path) - path.stat().st_mtime > ABANDONED_AFTER_S
    except FileNotFoundError:
        return False


def _take_away(path: Path) -> None:
    """Remove an abandoned lock; of several who try, one rename succeeds, and a fresh lock is never removed."""
    grave = path.with_name(f"{path.name}.abandoned.{socket.gethostname()}.{os.getpid()}.{threading.get_ident()}")
    try:
        os.rename(path, grave)
    except FileNotFoundError:
        return
    holder = _read(grave)
    if holder is not None and not _is_abandoned(grave, holder):  # somebody took it over meanwhile: give it back
        os.rename(grave, path)
        return
    grave.unlink(missing_ok=True)


def _file_system_now(path: Path) -> float:
    """The file system's clock: the two machines' own clocks may differ."""
    probe = path.with_name(f"{path.name}.clock.{socket.gethostname()}.{os.getpid()}")
    probe.touch()
    try:
        return probe.stat().st_mtime
    finally:
        probe.unlink(missing_ok=True)


def _boot_id() -> str:
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except FileNotFoundError:
        return ""


def _beat(path: Path, stop: threading.Event) -> None:
    while not stop.wait(HEARTBEAT_S):
        try:
            os.utime(path)
        except FileNotFoundError:
            return
