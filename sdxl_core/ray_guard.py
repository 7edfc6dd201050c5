"""Ends a Ray of a run's own with the process that started it, however that ends.

Ray's main processes are told by the kernel when their parent dies; its agents and workers notice by themselves, after
up to a minute or never. Each main process begins a session, to which all belong that it starts: a number that no
program, environment or title hides (Ray's agents write their titles over their environments). This one is told the
sessions through a pipe that the run's process holds, waits for the pipe's end, and then ends all that is in them, and
nothing else. Run as a file, so that nothing is imported: 20 ms.
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Set
from contextlib import contextmanager, suppress
from pathlib import Path

GIVE_UP_AFTER_S = 120.0  # they are killed; on a machine that is busy, processes need time to end


@contextmanager
def guarded(folder: str) -> Iterator[int]:
    """While inside, the Ray of `folder` cannot outlive this process; afterwards, nothing of it is there.

    Gives: the descriptor for `begin_session`.
    """
    command = [sys.executable, "-I", "-S", __file__, folder]
    with subprocess.Popen(command, stdin=subprocess.PIPE, start_new_session=True, cwd="/") as guard:
        assert guard.stdin is not None
        yield guard.stdin.fileno()  # leaving closes the pipe, and waits for the guard's end


def begin_session(guard: int) -> None:
    """For a process of Ray, before it changes into its program. `guard`: of `guarded`."""
    os.setsid()
    with suppress(BrokenPipeError):  # somebody has ended the guard
        os.write(guard, f"{os.getpid()}\n".encode())


def alive_in(sessions: Set[int]) -> list[int]:
    """The processes of these sessions, zombies not counted. Linux; elsewhere: []."""
    found = []
    for entry in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):  # gone meanwhile
            state, _, _, session = (entry / "stat").read_text().rpartition(")")[2].split()[:4]
            if int(session) in sessions and state not in "ZX":
                found.append(int(entry.name))
    return found


def end(folder: str, sessions: Set[int]) -> None:
    """SIGKILL to all that is in the sessions, until two looks found nothing; the folder goes too."""
    give_up_at, num_empty = time.monotonic() + GIVE_UP_AFTER_S, 0
    while num_empty < 2 and time.monotonic() < give_up_at:
        left = alive_in(sessions)
        for pid in left:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        num_empty = 0 if left else num_empty + 1
        time.sleep(0.02)
    shutil.rmtree(folder, ignore_errors=True)


if __name__ == "__main__":
    end(sys.argv[1], {int(line) for line in sys.stdin.buffer.read().split()})
