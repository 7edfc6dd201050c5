"""Map a function over items in forked processes; whatever a process does not deliver, the caller does itself."""

from __future__ import annotations

import gc
import multiprocessing
import os
import signal
import sys
import threading
import warnings
from collections.abc import Callable, Generator, Sequence
from contextlib import suppress
from multiprocessing.connection import Connection
from typing import TypeVar

from sdxl_core.lock import HEARTBEAT_THREAD

T = TypeVar("T")
R = TypeVar("R")


def num_processes(num_wanted: int) -> int:
    """How many processes can share work here: 1 where forking is unsafe (other threads run, or it is no Linux).

    The heartbeat of an output lock does not count: it holds nothing a child needs. Nor do idle threads of allocators
    and of OpenBLAS: merely importing pyarrow and numpy starts them, and their libraries take care of forks. Torch's may
    hold a lock of OpenMP.
    """
    num_threads = sum(thread.name != HEARTBEAT_THREAD for thread in threading.enumerate())
    if sys.platform != "linux" or num_threads > 1 or "torch" in sys.modules:
        return 1
    return max(1, min(num_wanted, len(os.sched_getaffinity(0))))


def map_forked(
    work: Callable[[T], R], items: Sequence[T], *, count: int, run: int = 1, caller_works: bool = True
) -> Generator[R]:
    """`work` of every item, in order, by `count` processes of which this one is the first.

    Processes take turns, `run` consecutive items at a time. `caller_works`: False: all of them are children, where
    there is more than one, so that this process does what it does with the results meanwhile.
    A process that fails or is killed just ends: its missing results are computed here, so a failure is met under its
    own name. Processes end with their parent, however it ends. Results must be picklable.
    """
    context = multiprocessing.get_context("fork")
    parent = os.getpid()
    first = 1 if caller_works or count == 1 else 0  # the first that is a child
    running, readers = [], list[Connection]()
    try:
        for start in range(first, count):
            reader, writer = context.Pipe(duplex=False)
            process = context.Process(
                target=_deliver,
                args=(
                    work,
                    [item for index, item in enumerate(items) if index // run % count == start],
                    writer,
                    [*readers, reader],
                    parent,
                ),
                daemon=True,
            )
            with warnings.catch_warnings():  # Python 3.12 warns of any thread, the idle ones above too
                warnings.simplefilter("ignore", DeprecationWarning)
                process.start()
            writer.close()
            running.append(process)
            readers.append(reader)
        for index, item in enumerate(items):
            owner = index // run % count - first
            if owner < 0 or readers[owner].closed:
                yield work(item)
                continue
            try:
                result = readers[owner].recv()
            except (EOFError, OSError):
                readers[owner].close()
                result = work(item)
            yield result
    finally:
        for process in running:
            process.terminate()
            process.join()
        for reader in readers:
            reader.close()


def _deliver(
    work: Callable[[T], object], items: Sequence[T], writer: Connection, inherited: Sequence[Connection], parent: int
) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the parent, which ends its children
    gc.freeze()  # what was inherited is not looked through, which would copy its pages
    for reader in inherited:
        reader.close()
    with suppress(Exception):
        for item in items:
            if os.getppid() != parent:
                return
            writer.send(work(item))
