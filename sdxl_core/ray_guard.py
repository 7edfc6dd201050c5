"""Ends a Ray of a run's own with the process that started it, however that ends.

Ray's main processes are told by the kernel when their parent dies; its agents notice by themselves, after up to a
minute. This one waits for the end of a pipe that the run's process holds, and then ends every process that was started
with this Ray's mark in its environment, and no other. Run as a file, so that nothing is imported: 20 ms.
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

MARK = "SDXL_FLOWS_RAY"  # in the environment of all that belongs to one Ray: its folder
GIVE_UP_AFTER_S = 30.0
QUIET_S = 1.0  # after a sudden death: what was being started shows itself


@contextmanager
def guarded(folder: str) -> Iterator[None]:
    """While inside, the Ray of `folder` cannot outlive this process; afterwards, nothing of it is there."""
    command = [sys.executable, "-I", "-S", __file__, folder]
    with subprocess.Popen(command, stdin=subprocess.PIPE, start_new_session=True, cwd="/") as guard:
        try:
            yield
        finally:
            assert guard.stdin is not None
            with suppress(BrokenPipeError):  # somebody has ended it
                os.write(guard.stdin.fileno(), b"Ray was shut down")  # leaving closes the pipe, and waits for its end


@contextmanager
def marked(folder: str) -> Iterator[None]:
    """Processes that are started inside, and those that they start, belong to the Ray of `folder`."""
    os.environ[MARK] = folder
    try:
        yield
    finally:
        del os.environ[MARK]


def processes_of(folder: str) -> list[int]:
    """What is alive of a Ray, by process id. Linux; elsewhere: []."""
    mark, found = f"{MARK}={folder}".encode(), []
    for entry in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):  # another user's, or gone meanwhile
            is_alive = (entry / "stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
            if is_alive and mark in (entry / "environ").read_bytes().split(b"\0"):
                found.append(int(entry.name))
    return found


def end(folder: str, *, quiet_s: float) -> None:
    """SIGKILL to all of it, until none was seen for `quiet_s` seconds; its folder goes too.

    One that is just being started may be overlooked: a process has no environment while it changes into a program.
    """
    now = started = seen = time.monotonic()
    while now - seen <= quiet_s and now - started < GIVE_UP_AFTER_S:
        left = processes_of(folder)
        for pid in left:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        time.sleep(0.02)
        now = time.monotonic()
        seen = now if left else seen
    shutil.rmtree(folder, ignore_errors=True)


if __name__ == "__main__":
    was_shut_down = bool(sys.stdin.buffer.read())
    end(sys.argv[1], quiet_s=0.0 if was_shut_down else QUIET_S)
