"""What a command costs: wall time, cpu time and memory of all its processes together."""

from __future__ import annotations

import os
import resource
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from typing import NamedTuple

SAMPLE_EVERY_S = 0.02


@dataclass(frozen=True, slots=True)
class Cost:
    """`private_mib`, `rss_mib`: peaks of sums over the process tree. Pages of mapped files count in `rss` only.

    What forked processes share counts once in `private_mib`, once for each of them in `rss_mib`.
    """

    wall_s: float
    cpu_s: float
    private_mib: float
    rss_mib: float


def cost_of(command: Sequence[str], *, log: Path | None = None, memory: bool = True) -> Cost:
    """Run a command and, for its memory, sample its process tree, which takes a tenth of a core.

    Raises: CalledProcessError: it failed.
    """
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    start = time.perf_counter()
    output = open(log, "ab") if log else subprocess.DEVNULL  # noqa: SIM115
    process = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT)
    private = rss = 0
    if not memory:
        process.wait()
    while process.poll() is None:
        began = time.perf_counter()
        sums = [_memory_kib(pid) for pid in _tree(process.pid)]
        private = max(private, sum(size[0] for size in sums))
        rss = max(rss, sum(size[1] for size in sums))
        time.sleep(max(SAMPLE_EVERY_S, 9 * (time.perf_counter() - began)))
    wall = time.perf_counter() - start
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    if process.returncode:
        raise subprocess.CalledProcessError(process.returncode, command)
    cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return Cost(wall, cpu, private / 1024, rss / 1024)


def free_cores() -> float:
    """How much of all cores a loop in each of as many processes gets now."""
    children = []
    for _ in os.sched_getaffinity(0):
        reader, writer = os.pipe()
        if not os.fork():
            wall, cpu = time.perf_counter(), time.process_time()
            while time.perf_counter() - wall < 0.3:
                pass
            os.write(writer, str((time.process_time() - cpu) / (time.perf_counter() - wall)).encode())
            os._exit(0)
        os.close(writer)
        children.append(reader)
    shares = [float(os.read(reader, 64)) for reader in children]
    for reader in children:
        os.close(reader)
        os.wait()
    return sum(shares)


def machine() -> str:
    """One line about the machine and the versions."""
    import platform

    import numpy
    import pyarrow

    lines = Path("/proc/cpuinfo").read_text().splitlines()
    model = next(line.split(":")[1].strip() for line in lines if line.startswith("model name"))
    return (
        f"{model}, {os.cpu_count()} cores, Linux {platform.release()}, Python {platform.python_version()}, "
        f"pyarrow {pyarrow.__version__}, numpy {numpy.__version__}"
    )


class Aim(NamedTuple):
    """A stated number, and what was found."""

    what: str
    asked: str
    found: str
    holds: bool


def aims_table(aims: Sequence[Aim]) -> list[str]:
    """Lines of a markdown table."""
    lines = ["| what | asked for | found | holds |", "|---|---|---|---|"]
    return [*lines, *(f"| {one.what} | {one.asked} | {one.found} | {'yes' if one.holds else 'NO'} |" for one in aims)]


def titled(title: str, text: str) -> str:
    """A page of a benchmark that runs as a module: title, command, date, what it measured."""
    command = " ".join(["python", "-m", f"benchmarks.{Path(sys.argv[0]).stem}", *sys.argv[1:]])
    return f"# {title}\n\n`{command}`, {date.today()}\n\n{text}"


def renew(page: Path, top: str) -> None:
    """Write the top of a page anew; what stands from its first heading of the second order on stays."""
    old = page.read_text() if page.exists() else ""
    start = old.find("\n## ")
    page.write_text(top.rstrip("\n") + "\n" + (old[start:] if start >= 0 else ""))


def _tree(root: int) -> list[int]:
    """A process and what it started: their numbers are higher, so that no others have to be looked at."""
    children: dict[int, list[int]] = {}
    for pid in sorted(int(name) for name in os.listdir("/proc") if name.isdecimal() and int(name) > root):
        try:
            fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        except OSError:
            continue
        children.setdefault(int(fields[1]), []).append(pid)
    found = [root]
    for pid in found:
        found += children.get(pid, [])
    return found


def _memory_kib(pid: int) -> tuple[int, int]:
    """Memory of its own, and all that is resident."""
    try:
        lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
    except OSError:
        return 0, 0
    sizes = {words[0]: int(words[1]) for line in lines[1:] if len(words := line.split()) == 3}
    return sizes.get("Pss_Anon:", 0), sizes.get("Rss:", 0)
