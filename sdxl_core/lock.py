"""One worker an output folder: a lock file with a heartbeat, which a killed holder cannot leave locked.

A holder of this very system (host, boot and process namespace) is dead when its process is. Any other (another machine
of a network file system, another container) is dead when its heartbeat stands still: it must look old by the file
system's clock and then not move while we watch it by our own, so a clock that jumps takes no lock from anybody.
"""

from __future__ import annotations

import os
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from uuid import uuid4

import orjson

from sdxl_core.errors import ConfigError, LockedError
from sdxl_core.files import disk_errors, folder_guard
from sdxl_core.processes import boot_id, process_start

HEARTBEAT_S = 10.0
ABANDONED_AFTER_S = 60.0
BEATS_WATCHED = 2.5  # how long an old heartbeat is watched before it counts as standing still
BEATS_MISSED = 3  # how often a holder may find its lock gone before it counts it as lost
LOCK_NAME = ".lock"
HEARTBEAT_THREAD = "output lock's heartbeat"  # it takes no lock that a process forked beside it could need
HOLDER_RUN = "SDXL_FLOWS_RUN"  # environment: what this process belongs to, for those who find its lock


@dataclass(slots=True)
class _Held:
    """A lock of this process. `token`: what is in our lock file.   `uses`: how many blocks are inside."""

    path: Path
    token: str
    uses: int = 0
    is_lost: bool = False
    stop: threading.Event = field(default_factory=threading.Event)


_held: dict[Path, _Held] = {}
_held_guard = threading.Lock()


@contextmanager
def output_lock(folder: Path, *, purpose: str, wait_s: float = 0.0) -> Iterator[None]:
    """Hold the folder while the block runs; use by the same process within it is free, and the last one out lets go.

    Args:   purpose: what the holder does, for the message others get.   wait_s: how long to wait for another holder.
    Raises: LockedError: somebody else holds it, with who and since when; or somebody took it over while we were
            stopped for longer than a heartbeat may stand still.
    """
    key = folder.resolve()
    held = _enter(key, purpose, wait_s)
    try:
        yield
    finally:
        _leave(key, held)
    if held.is_lost:
        raise LockedError(
            f"{folder}: another process took over while this one ({purpose}) was stopped for over a minute. What both "
            f"wrote may be mixed; run the same command again, it checks what is there."
        )


def held_token(folder: Path) -> str:
    """What `still_held` asks for, in any process that works for this one; "" where this process does not hold it."""
    with _held_guard:
        held = _held.get(folder.resolve())
        return "" if held is None else held.token


@contextmanager
def still_held(folder: Path, token: str) -> Iterator[None]:
    """Nobody takes the folder over while the (short) block runs, so that no two ever record in it.

    Args:   token: of the lock that is worked under; "" for a caller who needs none.
    Raises: LockedError: somebody took it over before, while this machine slept or was cut off from the file system.
    """
    if not token:
        yield
        return
    with folder_guard(folder.resolve()):
        if (_read(folder.resolve() / LOCK_NAME) or {}).get("token") != token:
            raise LockedError(
                f"{folder}: another process took over, or deleted the lock, while this one was stopped for over a "
                f"minute. Nothing was recorded since; run the same command again, it continues where the other stops."
            )
        yield


def _enter(key: Path, purpose: str, wait_s: float) -> _Held:
    with _held_guard:
        held = _held.get(key)
        if held is not None:
            held.uses += 1
            return held
    path = key / LOCK_NAME
    token = _acquire(path, purpose, wait_s)
    held = _Held(path, token, uses=1)
    with _held_guard:
        _held[key] = held
    threading.Thread(target=_beat, args=(held,), name=HEARTBEAT_THREAD, daemon=True).start()
    return held


def _leave(key: Path, held: _Held) -> None:
    with _held_guard:
        held.uses -= 1
        if held.uses:
            return
        del _held[key]
    held.stop.set()
    with folder_guard(held.path.parent):
        found = _read(held.path)
        if found is not None and found.get("token") == held.token:
            held.path.unlink(missing_ok=True)


def _acquire(path: Path, purpose: str, wait_s: float) -> str:
    deadline = time.monotonic() + wait_s
    token = uuid4().hex
    content = orjson.dumps(
        {
            **_system(),
            "pid": os.getpid(),
            "started": process_start(os.getpid()),
            "purpose": purpose,
            "run": os.environ.get(HOLDER_RUN, ""),
            "since": datetime.now(UTC).isoformat(timespec="seconds"),
            "token": token,
        }
    )
    try:
        with disk_errors(path):
            path.parent.mkdir(parents=True, exist_ok=True)
    except (NotADirectoryError, FileExistsError, FileNotFoundError) as error:
        raise ConfigError(
            f"{path.parent}: cannot be made a folder ({error.strerror}); something on its path is a file. Choose "
            f"another out folder."
        ) from error
    while not _create(path, content):
        holder = _read(path)
        if holder is None:
            continue
        if _is_abandoned(path, holder):
            _take_away(path, holder)
            continue
        if time.monotonic() >= deadline:
            if not holder:
                raise LockedError(
                    f"{path.parent}: {path.name} in it cannot be read, so it is not known who works on it. The "
                    f"lock counts until it was not touched for {ABANDONED_AFTER_S:.0f} s; if nobody does, delete it."
                )
            run = str(holder.get("run", ""))
            raise LockedError(
                f"{path.parent}: {holder.get('purpose')} is working on it since {holder.get('since')} (process "
                f"{holder.get('pid')} on {holder.get('host')}{', run ' + run if run else ''}). Wait until it has "
                f"finished, or end it; if it is surely gone, delete {path}.",
                run,
            )
        time.sleep(min(1.0, max(0.05, deadline - time.monotonic())))
    return token


def _create(path: Path, content: bytes) -> bool:
    """Create the lock file with its content in one step (a link to a finished file), False where there is one."""
    draft = path.with_name(f"{path.name}.{socket.gethostname()}.{os.getpid()}.{threading.get_ident()}")
    with disk_errors(path):
        try:
            draft.write_bytes(content)
            os.link(draft, path)
        except FileExistsError:
            return False
        finally:
            draft.unlink(missing_ok=True)
    return True


def _read(path: Path) -> dict[str, object] | None:
    """The holder as its lock file tells it, {} where the file is damaged, None where there is none."""
    try:
        holder = orjson.loads(path.read_bytes())
    except FileNotFoundError:
        return None
    except orjson.JSONDecodeError:
        return {}
    return holder if isinstance(holder, dict) else {}


def _is_abandoned(path: Path, holder: dict[str, object]) -> bool:
    system, pid = _system(), holder.get("pid")
    if isinstance(pid, int) and all(holder.get(name) == value for name, value in system.items()):
        return process_start(pid) != holder.get("started")
    try:
        seen = path.stat().st_mtime
        age_s = _file_system_now(path) - seen
        if 0 <= age_s <= ABANDONED_AFTER_S:
            return False
        watched_until = time.monotonic() + BEATS_WATCHED * HEARTBEAT_S
        while time.monotonic() < watched_until:
            time.sleep(HEARTBEAT_S / 10)
            if path.stat().st_mtime != seen:
                return False
    except FileNotFoundError:
        return False
    return True


def _take_away(path: Path, holder: dict[str, object]) -> None:
    """Remove the lock that was judged, and no other."""
    with folder_guard(path.parent):
        if _read(path) == holder:
            path.unlink(missing_ok=True)


def _file_system_now(path: Path) -> float:
    """The file system's clock: the two machines' own clocks may differ."""
    probe = path.with_name(f"{path.name}.clock.{socket.gethostname()}.{os.getpid()}")
    probe.touch()
    try:
        return probe.stat().st_mtime
    finally:
        probe.unlink(missing_ok=True)


def _system() -> dict[str, str]:
    """Where a process id means the same process: the host, its boot, and its namespace of process ids."""
    namespace = ""
    with suppress(OSError):
        namespace = os.readlink("/proc/self/ns/pid")
    return {"host": socket.gethostname(), "boot": boot_id(), "pid_namespace": namespace}


def _beat(held: _Held) -> None:
    """Touch the lock file until it is let go. A failing file system is tried again; one that is another's is lost."""
    missed = 0
    while not held.stop.wait(HEARTBEAT_S):
        try:
            found = _read(held.path)
            if found is not None and found.get("token") == held.token:
                os.utime(held.path)
                missed = 0
                continue
        except OSError:
            continue
        missed += 1
        if found or missed >= BEATS_MISSED:  # another's, or gone for good
            held.is_lost = not held.stop.is_set()
            return
