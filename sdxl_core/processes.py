"""Child processes that can be found again, ended as a group and never confused with a stranger's reused pid."""

from __future__ import annotations

import ctypes
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from functools import cache, partial
from pathlib import Path

PR_SET_PDEATHSIG = 1


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


def ending_with_parent(number: signal.Signals) -> Callable[[], None] | None:
    """A `preexec_fn`: the child is sent this signal when the thread that started it ends. Linux; elsewhere None."""
    if sys.platform != "linux":
        return None
    return partial(ctypes.CDLL(None).prctl, PR_SET_PDEATHSIG, number)


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


def _signal_group(group: int, number: signal.Signals) -> None:
    try:
        os.killpg(group, number)
    except (ProcessLookupError, PermissionError):
        return
