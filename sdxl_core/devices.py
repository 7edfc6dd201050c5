"""Device slots: one long-lived spawned process each, pinned to its device, rebuilt when it dies.

A task checks a slot out and runs an importable function there; the function may keep models loaded in module state
from call to call. Facts behind the design: docs/decisions.md, "Device slots".
"""

from __future__ import annotations

import multiprocessing as mp
import os
import queue
import signal
import subprocess
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from typing import Any, TypeVar

from sdxl_core.errors import ConfigError, SdxlFlowsError, TransientError

T = TypeVar("T")
READY_WITHIN_S = 2.0  # else another slot is asked


class SlotDied(TransientError):
    """The slot's process was killed (out of memory, SIGKILL, a crash in a decoder). Safe to retry on a fresh one."""


class SlotsClosed(SdxlFlowsError):
    """The job is being cancelled. Never retried."""


def cuda_devices() -> list[str]:
    """Indices of the CUDA cards this process may use, without importing torch ([] where there is no driver)."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is not None:
        return [name.strip() for name in visible.split(",") if name.strip() not in ("", "-1")]
    try:
        listing = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True, check=True, timeout=30)
    except (OSError, subprocess.SubprocessError):
        return []
    return [str(i) for i, line in enumerate(listing.stdout.splitlines()) if line.startswith("GPU ")]


def resolve_devices(devices: str) -> list[str]:
    """`auto` -> every CUDA card, else one CPU slot; else the comma list as written ("0,1", "cpu,cpu", "0,0").

    Raises: ConfigError: an entry is neither `cpu` nor the number of a card that exists.
    """
    cards = cuda_devices()
    if devices.strip() == "auto":
        return cards or ["cpu"]
    names = [name.strip() for name in devices.split(",") if name.strip()]
    for name in names:
        if name != "cpu" and name not in cards:
            raise ConfigError(
                f"devices = {devices!r}: there is no device {name!r} here (found: {', '.join([*cards, 'cpu'])}). "
                f"Write auto, or a list such as 0,1 or cpu,cpu."
            )
    if not names:
        raise ConfigError("devices is empty. Write auto, or a list such as 0,1 or cpu,cpu.")
    return names


def _watch_parent() -> None:
    parent = mp.parent_process()
    if parent is not None:
        parent.join()  # a pipe the parent holds: ends however the parent dies
        os._exit(113)


_num_slots = 1  # that share this machine's cores


def cores_of_slot() -> int:
    """Cores this process may count on: all that it is allowed to use, shared by the slots of its job; at least 1."""
    return max(1, len(os.sched_getaffinity(0)) // _num_slots)


def share_cores(num_slots: int) -> None:
    """Tell this process how many slots of its job share this machine's cores."""
    global _num_slots
    _num_slots = num_slots


def _start_slot(device: str, num_slots: int) -> None:
    share_cores(num_slots)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C: the parent decides
    os.environ["CUDA_VISIBLE_DEVICES"] = "" if device == "cpu" else device
    threading.Thread(target=_watch_parent, daemon=True).start()


class Slot:
    """One device and the process that owns it. Not for concurrent calls: check it out from `Slots`."""

    def __init__(self, device: str, *, num_slots: int = 1) -> None:
        self.device = device
        self._num_slots = num_slots
        self._pool: ProcessPoolExecutor | None = None
        self._closed = False
        self._lock = threading.Lock()

    def is_ready(self, *, wait_s: float) -> bool:
        """Whether a call would begin at once, or does within `wait_s` seconds; a process is started when called."""
        return True

    def run(self, function: Callable[..., T], *args: Any) -> T:
        """Call `function(*args)` in the slot's process; both must pickle by reference to an importable module.

        Raises: SlotDied: the process was killed; the next call starts a fresh one.   SlotsClosed: after `stop`.
        """
        try:
            with self._lock:
                if self._closed:
                    raise self.closed_error()
                if self._pool is None:
                    self._pool = ProcessPoolExecutor(
                        1, mp.get_context("spawn"), _start_slot, (self.device, self._num_slots)
                    )
                future = self._pool.submit(function, *args)
            return future.result()
        except BrokenProcessPool as error:
            closed = self._closed
            self.stop(closing=closed)
            if closed:
                raise self.closed_error() from error
            raise self.died_error() from error

    def closed_error(self) -> SlotsClosed:
        return SlotsClosed(f"device slot {self.device} is closed: the job is being cancelled.")

    def died_error(self) -> SlotDied:
        return SlotDied(
            f"the process on device {self.device} was killed (out of memory, or a signal). What it had committed "
            f"is kept; the shard is tried again on a fresh process."
        )

    def stop(self, *, closing: bool = True) -> None:
        """Kill the process, busy or not. With `closing`, later calls raise SlotsClosed."""
        with self._lock:
            pool, self._pool, self._closed = self._pool, None, closing or self._closed
        if pool is not None:
            processes = list((pool._processes or {}).values())
            pool.shutdown(wait=False, cancel_futures=True)
            for process in processes:
                process.kill()
            for process in processes:
                process.join()


class Slots:
    """All slots of a job; a context manager that kills their processes at the end, cancellation included."""

    def __init__(self, devices: Sequence[str]) -> None:
        self.slots: list[Slot] = []
        self._free: queue.SimpleQueue[Slot] = queue.SimpleQueue()
        for device in devices:
            self.add(Slot(device, num_slots=len(devices)))

    def add(self, slot: Slot) -> None:
        self.slots.append(slot)
        self._free.put(slot)

    @contextmanager
    def checkout(self) -> Iterator[Slot]:
        """Wait for a slot that is free and ready, and give it back afterwards. Raises: SlotsClosed."""
        while True:
            slot = self._free.get()
            try:
                if slot.is_ready(wait_s=READY_WITHIN_S):
                    yield slot
                    return
            finally:
                self._free.put(slot)

    def stop(self) -> None:
        """Kill every process, busy or not; later calls raise SlotsClosed."""
        for slot in self.slots:
            slot.stop()

    def __enter__(self) -> Slots:
        return self

    def __exit__(self, *exc: object) -> None:
        self.stop()
