"""Device slots on a Ray cluster: one actor each, which has a GPU to itself and is made anew when it dies.

The flow's threads call actors as they call the processes of this machine, so retries, cached shards, progress and
cancelling are the same; the machines of the cluster need this package and the files, but neither Prefect nor its
server. Why not Prefect's own Ray task runner: docs/decisions.md, "Ray".
"""

from __future__ import annotations

import importlib.util
import logging
import os
import signal
import socket
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from sdxl_core import __version__
from sdxl_core.devices import READY_WITHIN_S, Slot, SlotDied, Slots, share_cores
from sdxl_core.errors import ConfigError
from sdxl_core.ray_guard import begin_session, guarded

T = TypeVar("T")
logger = logging.getLogger(__name__)

OBJECT_STORE_BYTES = 100_000_000  # references travel, never pictures; Ray's own default is a third of the memory
WAITING_TOLD_EVERY_S = 300.0
CALLS_END_WITHIN_S = 5.0
SETTINGS = {  # the user's own win
    "RAY_USAGE_STATS_ENABLED": "0",  # Ray's telemetry
    "RAY_SCHEDULER_EVENTS": "0",  # advice about autoscalers, on the terminal
}
LOOPBACK = {"RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0"}  # Ray's name for: a node is known as, and listens on, 127.0.0.1


def check_ray() -> None:
    """Raises: ConfigError: Ray is not installed."""
    if importlib.util.find_spec("ray") is None:
        raise ConfigError(
            "engine = ray: Ray is not installed here. Install it (pip install 'sdxl-flows[ray]', on every machine of "
            "the cluster), or leave engine out: then this machine's own devices do the work."
        )


def ray_devices(devices: str) -> list[str] | None:
    """The list as written ("gpu,gpu", "cpu"), None for `auto`. Raises: ConfigError: another word."""
    names = [name.strip() for name in devices.split(",") if name.strip()]
    if names == ["auto"]:
        return None
    if not names or not set(names) <= {"cpu", "gpu"}:
        raise ConfigError(
            f"devices = {devices!r}: with engine = ray, Ray chooses machines and cards. Write auto, or a list such as "
            f"gpu,gpu or cpu,cpu: a slot each."
        )
    return names


@dataclass(frozen=True, slots=True, kw_only=True)
class Place:
    """Where an actor is. `card`: what it may use, "cpu" if none.   `sees`: whether our files are there."""

    host: str
    card: str
    version: str
    sees: bool

    @property
    def device(self) -> str:
        return f"{self.host}:{self.card}"


class Worker:
    """The actor: calls functions in its process, which keep what they load in module state (the VAE).

    Args:   kind: cpu or gpu.   threads: OMP_NUM_THREADS of the driver; Ray sets its own, and sums depend on it.
            num_slots: slots of this job by host.   witness: a file that all machines must see with this content.
    """

    def __init__(self, kind: str, threads: str | None, num_slots: dict[str, int], witness: tuple[Path, bytes]) -> None:
        if threads is None:
            os.environ.pop("OMP_NUM_THREADS", None)  # as torch has not been imported yet
        else:
            os.environ["OMP_NUM_THREADS"] = threads
        if kind == "cpu":
            os.environ["CUDA_VISIBLE_DEVICES"] = ""
        share_cores(num_slots.get(socket.gethostname(), 1))
        self._kind, self._witness = kind, witness

    def place(self) -> Place:
        path, content = self._witness
        card = "cpu" if self._kind == "cpu" else os.environ.get("CUDA_VISIBLE_DEVICES", "?")
        try:
            sees = path.read_bytes() == content
        except OSError:
            sees = False
        return Place(host=socket.gethostname(), card=card, version=__version__, sees=sees)

    def call(self, function: Callable[..., Any], args: tuple[Any, ...]) -> Any:
        return function(*args)


class RaySlot(Slot):
    """One actor, made when it is first asked for. Not for concurrent calls: check it out from `RaySlots`."""

    def __init__(self, kind: str, make: Callable[[str], Any]) -> None:
        super().__init__(kind)
        self._kind, self._make = kind, make
        self._actor: Any = None
        self._place: Any = None  # Ray's promise of a Place
        self._is_placed = False
        self._told = time.monotonic()

    def is_ready(self, *, wait_s: float) -> bool:
        """Whether the cluster has room for it. Raises: SlotsClosed, SlotDied.   ConfigError: a machine of another
        version, or one that does not see our files."""
        import ray

        with self._lock:
            if self._closed:
                raise self.closed_error()
            if self._actor is None:
                self._actor = self._make(self._kind)
                self._place, self._is_placed = self._actor.place.remote(), False
            place = self._place
        if self._is_placed:
            return True
        if not ray.wait([place], timeout=wait_s)[0]:
            self._tell_waiting()
            return False
        found = self._answer(place)
        _check(found)
        self.device, self._is_placed = found.device, True
        return True

    def run(self, function: Callable[..., T], *args: Any) -> T:
        """As `Slot.run`. What the function raises is raised; Ray's account of where is its cause."""
        while not self.is_ready(wait_s=READY_WITHIN_S):
            pass
        result: T = self._answer(self._actor.call.remote(function, args))
        return result

    def _tell_waiting(self) -> None:
        if time.monotonic() - self._told > WAITING_TOLD_EVERY_S:
            logger.warning("waiting for a free %s of the Ray cluster", self._kind)
            self._told = time.monotonic()

    def _answer(self, promise: Any) -> Any:
        import ray

        try:
            return ray.get(promise)
        except ray.exceptions.RayTaskError as error:
            raise error.cause from error
        except ray.exceptions.RayError as error:
            closed = self._closed
            self.stop(closing=closed)
            if closed:
                raise self.closed_error() from error
            raise SlotDied(
                f"the process on {self.device} of the Ray cluster was lost: {_reason(error)} What it had committed is "
                f"kept; the shard is tried again in a new one."
            ) from error

    def stop(self, *, closing: bool = True) -> None:
        import ray

        with self._lock:
            actor, self._actor, self._closed = self._actor, None, closing or self._closed
        if actor is not None:
            with suppress(ray.exceptions.RayError):  # the cluster itself is gone
                ray.kill(actor)


class RaySlots(Slots):
    """The slots of a job on a cluster; a context manager that is connected while it is inside.

    Args:   devices: as `ray_devices`.   address: local, auto, or the head's HOST:PORT.
            witness: a file of the job's folder, there when it is entered; a machine that does not see it is refused.
    Raises: ConfigError: Ray is not installed, devices cannot be read; entering: no such cluster, or too small a one.
    """

    def __init__(self, devices: str, *, address: str, witness: Path) -> None:
        super().__init__(())
        check_ray()
        self._wanted, self._address, self._witness = ray_devices(devices), address, witness
        self._connection = ExitStack()

    def __enter__(self) -> RaySlots:
        with ExitStack() as connection:
            connection.enter_context(_connected(self._address))
            kinds, num_slots = _placed(self._wanted, _machines())
            make = partial(_make, num_slots=num_slots, witness=(self._witness.resolve(), self._witness.read_bytes()))
            for kind in kinds:
                self.add(RaySlot(kind, make))
            self._connection = connection.pop_all()
        return self

    def __exit__(self, *exc: object) -> None:
        self.stop()
        deadline = time.monotonic() + CALLS_END_WITHIN_S
        while self._free.qsize() < len(self.slots) and time.monotonic() < deadline:
            time.sleep(0.05)  # threads that learn just now that their calls are over still speak to Ray
        self._connection.close()


def _make(kind: str, *, num_slots: dict[str, int], witness: tuple[Path, bytes]) -> Any:
    """An actor, which is never restarted by Ray: a restart behind our back would redo a call that we count."""
    import ray

    needs: dict[str, Any] = {"num_cpus": 0, "num_gpus": 1} if kind == "gpu" else {"num_cpus": 1, "num_gpus": 0}
    actor = ray.remote(Worker).options(scheduling_strategy="SPREAD", max_restarts=0, **needs)
    return actor.remote(kind, os.environ.get("OMP_NUM_THREADS"), num_slots, witness)


def _reason(error: Exception) -> str:
    """The sentence of Ray's paragraphs that says why."""
    lines = [line.strip() for line in str(error).splitlines()]
    said = [line for line in lines if line.startswith("The actor is dead because") or "Error: " in line]
    return (said or lines or [type(error).__name__])[-1].rstrip(".") + "."


def _check(place: Place) -> None:
    if place.version != __version__:
        raise ConfigError(
            f"the Ray machine {place.host} has sdxl-flows {place.version}, this one {__version__}. Install the same "
            f"version on every machine of the cluster, and start its Ray again."
        )
    if not place.sees:
        raise ConfigError(
            f"the Ray machine {place.host} does not see the files of this job. `source` and `out` must lie on storage "
            f"that every machine of the cluster has mounted at the same path (docs/cluster.md)."
        )


def _machines() -> dict[str, Counter[str]]:
    """CPUs and GPUs of the cluster by host; several nodes of one host are added up."""
    import ray

    machines: dict[str, Counter[str]] = {}
    for node in ray.nodes():
        if node["Alive"]:
            found = {name: int(node["Resources"].get(name, 0)) for name in ("CPU", "GPU")}
            machines.setdefault(node["NodeManagerHostname"], Counter()).update(found)
    return machines


def _placed(wanted: list[str] | None, machines: dict[str, Counter[str]]) -> tuple[list[str], dict[str, int]]:
    """The kind of each slot, and how many of them a host may get. Raises: ConfigError: more than the cluster has."""
    total: Counter[str] = sum(machines.values(), Counter())
    kinds = wanted or ["gpu"] * total["GPU"] or ["cpu"] * sum(machine["CPU"] > 0 for machine in machines.values())
    for kind in ("gpu", "cpu"):
        if kinds.count(kind) > total[kind.upper()]:
            raise ConfigError(
                f"devices asks for {kinds.count(kind)} {kind} slots, and the Ray cluster has {total[kind.upper()]} "
                f"({', '.join(sorted(machines))}). Write auto, or start Ray on more machines (docs/cluster.md)."
            )
    if not kinds:
        raise ConfigError("the Ray cluster has neither GPU nor CPU to offer. Start Ray with --num-gpus or --num-cpus.")
    num_hosts = sum(machine["CPU"] > 0 for machine in machines.values()) or 1
    on_cpu = -(-kinds.count("cpu") // num_hosts)  # actors are spread
    return kinds, {host: min(kinds.count("gpu"), machine["GPU"]) + on_cpu for host, machine in machines.items()}


@contextmanager
def _connected(address: str) -> Iterator[None]:
    """Ray of this process: what the caller has connected to, else the cluster at `address`."""
    os.environ.update({name: os.environ.get(name, value) for name, value in SETTINGS.items()})
    if address == "local":
        os.environ.update(LOOPBACK)
    import ray

    if ray.is_initialized():
        yield
        return
    settings: dict[str, Any] = {"address": address, "logging_level": logging.ERROR, "log_to_driver": False}
    with ExitStack() as stack:
        starting = ExitStack()
        if address == "local":
            folder = tempfile.mkdtemp(prefix="sdxl-ray-", dir=os.environ.get("RAY_TMPDIR", "/tmp"))  # sockets: short
            starting.enter_context(_in_sessions(stack.enter_context(guarded(folder))))
            settings |= {
                "_temp_dir": folder,
                "include_dashboard": False,
                "object_store_memory": OBJECT_STORE_BYTES,
            }
        try:
            with starting, _own_sigterm():
                ray.init(**settings)
        except (ConnectionError, RuntimeError, ValueError, ray.exceptions.RayError) as error:
            raise ConfigError(
                f"ray_address = {address}: no Ray cluster can be used there ({str(error).strip().splitlines()[0]}). "
                f"This machine must belong to it: `ray start --address=HEAD:6379` (docs/cluster.md)."
            ) from error
        stack.callback(_end_own if address == "local" else ray.shutdown)
        yield


def _end_own() -> None:
    """Disconnect from the Ray of this process at once: by itself it waits a second for each of Ray's processes."""
    import ray

    node = ray._private.worker._global_node
    kill_node = node.kill_all_processes
    node.kill_all_processes = lambda **_: kill_node(check_alive=False)
    ray.shutdown()


@contextmanager
def _in_sessions(guard: int) -> Iterator[None]:
    """Ray's processes begin sessions of their own, which the guard is told.

    A cancelled run is sent SIGTERM, and so is all of its process group: their sudden end would make ours slow, and look
    like a death. So they live until we end them.
    """
    from ray._private import utils

    prepare_child = utils.set_kill_on_parent_death_linux

    def prepare_child_in_a_session() -> None:
        prepare_child()
        begin_session(guard)

    utils.set_kill_on_parent_death_linux = prepare_child_in_a_session
    try:
        yield
    finally:
        utils.set_kill_on_parent_death_linux = prepare_child


@contextmanager
def _own_sigterm() -> Iterator[None]:
    """Keep SIGTERM ours while Ray starts: it puts a handler of its own in place of the one that answers a cancel."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.getsignal(signal.SIGTERM)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
