"""The contenders of benchmarks/engines.py, and how they are measured.

Every shard is a no-op (the id of the process it ran in) in a Prefect task with retries, on two CPU slots, against a
server of its own. Contenders alternate; medians. Where prefect-ray is importable, its task runner is measured, too.
"""

from __future__ import annotations

import importlib.util
import os
import platform
import signal
import statistics
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

import psutil  # noqa: E402
from prefect import flow, task  # noqa: E402
from prefect.testing.utilities import prefect_test_harness  # noqa: E402
from support.ray_cluster import two_nodes  # noqa: E402

import tasks  # noqa: F401, E402  (the project's Prefect settings)
from flows.fan_out import gather  # noqa: E402
from sdxl_core.devices import SlotDied, Slots  # noqa: E402
from sdxl_core.ray_slots import RaySlots  # noqa: E402
from tasks.policies import ONCE, RETRIED  # noqa: E402

SIZES, NUM_CALLS = (25, 100, 400), 500
Contender = Callable[[Path], Any]


@task(**ONCE, **RETRIED)
def shard_in_slot(number: int, slots: Slots) -> int:
    with slots.checkout() as slot:
        return slot.run(os.getpid)


@flow
def shards_in_slots(num_shards: int, slots: Slots) -> float:
    """Seconds for all shards."""
    started = time.monotonic()
    gather(lambda number: shard_in_slot.submit(number, slots), range(num_shards), limit=len(slots.slots))
    return time.monotonic() - started


@contextmanager
def processes(witness: Path) -> Iterator[Slots]:
    with Slots(["cpu", "cpu"]) as slots:
        yield slots


@contextmanager
def local_ray(witness: Path) -> Iterator[Slots]:
    with RaySlots("cpu,cpu", address="local", witness=witness) as slots:
        yield slots


@contextmanager
def ray_of_two_nodes(witness: Path) -> Iterator[Slots]:
    with two_nodes(num_cpus=1), RaySlots("cpu,cpu", address="auto", witness=witness) as slots:
        yield slots


CONTENDERS = {"processes": processes, "Ray, local": local_ray, "Ray, two nodes": ray_of_two_nodes}


def cpu_seconds() -> float:
    """Of the whole machine: Ray's helpers belong to nobody here."""
    times = psutil.cpu_times()
    return float(times.user + times.system + times.nice)


def helpers_mb(slots: Slots) -> float:
    """Private memory of all that was started beside this process and the slots' own."""
    own = {os.getpid(), *(slot.run(os.getpid) for slot in slots.slots)}
    family = psutil.Process().children(recursive=True)
    started = [one for one in family if one.pid not in own and "uvicorn" not in " ".join(one.cmdline())]
    return sum(one.memory_full_info().uss for one in started) / 1e6


def recovery_s(slots: Slots) -> float:
    """From the SIGKILL of a busy slot's process to the next answer of that slot."""
    slot = slots.slots[0]
    pid = slot.run(os.getpid)
    threading.Timer(0.2, os.kill, (pid, signal.SIGKILL)).start()
    started = time.monotonic() + 0.2
    try:
        slot.run(time.sleep, 60)
    except SlotDied:
        slot.run(os.getpid)
    return time.monotonic() - started


def measure(name: str, witness: Path, found: dict[str, list[float]]) -> None:
    started = time.monotonic()
    with CONTENDERS[name](witness) as slots:
        for slot in slots.slots:
            slot.run(os.getpid)
        found.setdefault("s until both slots answer", []).append(time.monotonic() - started)
        slot = slots.slots[0]
        started = time.monotonic()
        for _ in range(NUM_CALLS):
            slot.run(os.getpid)
        found.setdefault("ms a call, without Prefect", []).append((time.monotonic() - started) / NUM_CALLS * 1e3)
        for num in SIZES:
            cpu = cpu_seconds()
            seconds = shards_in_slots(num, slots)
            found.setdefault(f"ms a shard, of {num}", []).append(seconds / num * 1e3)
            found.setdefault(f"cpu ms a shard, of {num}", []).append((cpu_seconds() - cpu) / num * 1e3)
        found.setdefault("s from a kill to the next answer", []).append(recovery_s(slots))
        found.setdefault("MB of helper processes", []).append(helpers_mb(slots))


def measure_prefect_ray(found: dict[str, list[float]]) -> None:
    """The same no-op as a task of prefect-ray's runner on a local Ray."""
    from prefect_ray import RayTaskRunner

    runner = RayTaskRunner(init_kwargs={"num_cpus": 2, "include_dashboard": False, "object_store_memory": 100_000_000})

    @task(**ONCE, **RETRIED)
    def shard(number: int) -> int:
        return os.getpid()

    @flow(task_runner=runner)
    def shards(num_shards: int) -> tuple[float, int]:
        shard.submit(0).result()
        started = time.monotonic()
        pids = [future.result() for future in [shard.submit(number) for number in range(num_shards)]]
        return time.monotonic() - started, len(set(pids))

    for num in SIZES:
        cpu = cpu_seconds()
        seconds, _ = shards(num)
        found.setdefault(f"ms a shard, of {num}", []).append(seconds / num * 1e3)
        found.setdefault(f"cpu ms a shard, of {num}", []).append((cpu_seconds() - cpu) / num * 1e3)


def table(results: dict[str, dict[str, list[float]]]) -> list[str]:
    rows = list(dict.fromkeys(row for found in results.values() for row in found))
    lines = ["| | " + " | ".join(results) + " |", "|---|" + "---|" * len(results)]
    for row in rows:
        cells = []
        for found in results.values():
            values = found.get(row)
            cells.append(f"{statistics.median(values):.3g} ({min(values):.3g}–{max(values):.3g})" if values else "–")
        lines.append(f"| {row} | " + " | ".join(cells) + " |")
    return lines


def report(rounds: int) -> list[str]:
    """Measure, and say it in markdown."""
    results: dict[str, dict[str, list[float]]] = {name: {} for name in CONTENDERS}
    with tempfile.TemporaryDirectory() as folder, prefect_test_harness(server_startup_timeout=120):
        witness = Path(folder) / "witness"
        witness.write_text("benchmark")
        for _ in range(rounds):
            for name in CONTENDERS:
                measure(name, witness, results[name])
        if importlib.util.find_spec("prefect_ray") is not None:
            results["prefect-ray's task runner"] = {}
            measure_prefect_ray(results["prefect-ray's task runner"])
    import prefect
    import ray

    return [
        "# What a shard costs beside its work, by engine",
        "",
        "`" + " ".join(["python", "benchmarks/engines.py", *sys.argv[1:]]) + "`",
        "",
        f"{os.cpu_count()} cores, Python {platform.python_version()}, Prefect {prefect.__version__} (SQLite), Ray "
        f"{ray.__version__}; {rounds} rounds, contenders in turn; median (least–most). cpu: of the whole "
        f"machine, server included. The two nodes are two sets of Ray's processes on this machine.",
        "",
        *table(results),
    ]
