"""Child processes that can be found again, ended as a group and never confused with a stranger's reused pid."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from collections.abc import Iterable, Mapping
from contextlib import suppress
from functools import cache
from pathlib import Path


def process_start(pid: int) -> str | None:
    """When process `pid` started, as an opaque text that changes if the pid is reused; None where it is gone.

    Linux: the start time in clock ticks since boot (proc(5), field 22); a zombie counts as gone. Elsewhere: "" for a
    process that exists.
    """
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except FileNotFoundError:
        if Path("/proc/self").exists():
            return None
    except ProcessLookupError:
        return None
    else:
        return None if fields[0] in "ZX" else fields[19]
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return None
    except PermissionError:
        return ""
    return ""


@cache
def boot_id() -> str:
    """What distinguishes this boot of this system from all others; "" where that is not told.

    What was written in this boot is read back as it was written, after a SIGKILL too, whether or not it was synced.
    """
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:
        return ""


def end_group(process: subprocess.Popen[bytes] | subprocess.Popen[str], *, grace_s: float) -> None:
    """SIGTERM to a child's process group, SIGKILL to what is left of it after `grace_s` seconds.

    The child must have been started with `start_new_session=True`. A child that ends before its own children
    (`accelerate launch` does) does not cost them their grace.
    """
    _signal_group(process.pid, signal.SIGTERM)
    deadline = time.monotonic() + grace_s
    while (process.poll() is None or group_lives(process.pid)) and time.monotonic() < deadline:
        time.sleep(0.05)
    _signal_group(process.pid, signal.SIGKILL)
    process.wait()


def group_lives(group: int) -> bool:
    """Whether a process group has a member that is no zombie (orphans of a container may stay zombies)."""
    if not Path("/proc/self").exists():
        try:
            os.killpg(group, 0)
        except (ProcessLookupError, PermissionError):
            return False
        return True
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = path.read_text().rpartition(")")[2].split()
        except (FileNotFoundError, ProcessLookupError):
            continue
        if int(fields[2]) == group and fields[0] not in "ZX":
            return True
    return False


def families(roots: Iterable[int]) -> dict[int, str]:
    """The processes `roots` and all that descend from them, each with its `process_start`. Linux; elsewhere: {}."""
    children: dict[int, list[int]] = {}
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            parent = int(path.read_text().rpartition(")")[2].split()[1])
        except (FileNotFoundError, ProcessLookupError):
            continue
        children.setdefault(parent, []).append(int(path.parent.name))
    found: dict[int, str] = {}
    left = list(roots)
    while left:
        pid = left.pop()
        started = process_start(pid)
        if started is not None and pid not in found:
            found[pid] = started
            left += children.get(pid, [])
    return found


def kill(processes: Mapping[int, str]) -> None:
    """SIGKILL to those of `families` that are still there."""
    for pid, started in processes.items():
        if process_start(pid) == started:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)


def _signal_group(group: int, number: signal.Signals) -> None:
    try:
        os.killpg(group, number)
    except (ProcessLookupError, PermissionError):
        return
