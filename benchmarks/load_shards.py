"""Many latent shards through one flow run, on the embedded server's SQLite and on PostgreSQL; then again, all finished.

    python benchmarks/load_shards.py WORK --shards 80 --databases sqlite,postgresql --out load.md

Each shard holds one small drawn picture, so that what is measured is what a shard costs besides its pictures: the
task run, its states and events, the ledger. The first run encodes all, the second finds all finished (Cached).
`stage` is the same work by the command without a server: what the shards cost anyway. Server: the process that
`sdxl-flows up` started, its cpu seconds and its largest resident memory. Rows are appended to WORK/rows.jsonl; the
page has all of them.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import resource
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from datetime import datetime
from pathlib import Path
from uuid import UUID

from PIL import Image

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "tests"))
from measure import renew  # noqa: E402
from support.postgres import postgres  # noqa: E402
from support.run_processes import in_role, processes_of  # noqa: E402
from support.service import Service  # noqa: E402

from sdxl_core.config import CacheLatentsConfig, MergeTagsConfig  # noqa: E402
from sdxl_core.merge.plan import merge_tags  # noqa: E402

LIMIT_S = 1500
TICKS = os.sysconf("SC_CLK_TCK")


@dataclass(frozen=True)
class Row:
    """One flow run. Seconds and MiB; `late_s`: from the run's end until the server had the end of every task run."""

    database: str
    shards: int
    run: str
    wall_s: float
    flow_cpu_s: float
    server_cpu_s: float
    server_mib: int
    late_s: float
    states: dict[str, int]


def pictures(folder: Path, number: int) -> Path:
    """So many pictures of 64 x 64 pixels with tags."""
    place = folder / f"pictures-{number}"
    place.mkdir(parents=True, exist_ok=True)
    for index in range(number):
        if not (place / f"{index:05d}.png").exists():
            Image.new("RGB", (64, 64), (index % 256, index // 256, 90)).save(place / f"{index:05d}.png")
            (place / f"{index:05d}.txt").write_text("scenery, flat")
    return place


def config(folder: Path, number: int, out: Path) -> CacheLatentsConfig:
    source = pictures(folder, number)
    merge_tags(MergeTagsConfig(source=source, out=out / "meta_cap_dd.json"))
    return CacheLatentsConfig(
        source=source, metadata=out / "meta_cap_dd.json", out=out, vae="tiny", resolution_px=64, min_bucket_px=64,
        max_bucket_px=64, shard_size=1, batch_size=1, devices="cpu,cpu",
    )  # fmt: skip


def cpu_s(pids: set[int]) -> float:
    """User and system time of the processes and of their children that have ended."""
    total = 0.0
    for pid in pids:
        try:
            fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        except (FileNotFoundError, ProcessLookupError):
            continue
        total += sum(map(int, fields[11:15])) / TICKS
    return total


def rss_mib(pids: set[int]) -> int:
    kib = 0
    for pid in pids:
        try:
            lines = Path(f"/proc/{pid}/status").read_text().splitlines()
        except (FileNotFoundError, ProcessLookupError):
            continue
        kib += sum(int(line.split()[1]) for line in lines if line.startswith("VmRSS"))
    return kib // 1024


class Watched(threading.Thread):
    """Largest memory of the server, and the flow's cpu time as it was last seen."""

    def __init__(self, server: set[int], run: UUID) -> None:
        super().__init__(daemon=True)
        self.server, self.run_, self.server_mib, self.flow_cpu_s = server, run, 0, 0.0
        self.stop = threading.Event()

    def run(self) -> None:
        while not self.stop.wait(1):
            self.server_mib = max(self.server_mib, rss_mib(self.server))
            self.flow_cpu_s = max(self.flow_cpu_s, cpu_s(processes_of(self.run_)))


def flow_run(service: Service, database: str, asked: CacheLatentsConfig, kind: str, shards: int) -> Row:
    """Submit, wait, count. Wall time is the run's own, from Running to Completed."""
    server = in_role("server", set(service.processes()))
    before = cpu_s(server)
    run = service.submit(
        "cache-latents/cache-latents", {"config": asked.model_dump(mode="json", exclude_defaults=True)}
    )
    watched = Watched(server, run)
    watched.start()
    service.wait_for(run, "Completed", timeout_s=LIMIT_S)
    ended = time.monotonic()
    states = task_states(service, run, expected=shards + 2)
    late_s = time.monotonic() - ended
    watched.stop.set()
    watched.join()
    with service.client() as client:
        history = {state.name: state.timestamp for state in client.read_flow_run_states(run)}
    return Row(
        database, shards, kind, round((history["Completed"] - history["Running"]).total_seconds(), 1),
        round(watched.flow_cpu_s, 1), round(cpu_s(server) - before, 1), watched.server_mib, round(late_s, 1),
        dict(states),
    )  # fmt: skip


def task_states(service: Service, run: UUID, *, expected: int) -> Counter[str]:
    """States of all task runs, once none is under way. Raises: SystemExit: some are stuck."""
    from prefect.client.schemas.filters import FlowRunFilter

    deadline = time.monotonic() + 300
    while time.monotonic() < deadline:
        found: Counter[str] = Counter()
        with service.client() as client:
            for offset in range(0, expected, 200):
                tasks = client.read_task_runs(
                    flow_run_filter=FlowRunFilter(id={"any_": [run]}), limit=200, offset=offset
                )
                found.update(str(task.state_name) for task in tasks)
        if sum(found.values()) == expected and set(found) <= {"Completed", "Cached"}:
            return found
        time.sleep(1)
    raise SystemExit(f"stuck: {found}")


def stage(asked: CacheLatentsConfig, shards: int, kind: str) -> Row:
    """The same work by the command."""
    path = asked.out / "stage.json"
    path.write_text(asked.model_dump_json(exclude_defaults=True))
    code = (
        "import sys\nfrom sdxl_core.config import CacheLatentsConfig\n"
        "from sdxl_core.latents.cache import cache_latents\n"
        "cache_latents(CacheLatentsConfig.model_validate_json(open(sys.argv[1]).read()))\n"
    )
    before, began = resource.getrusage(resource.RUSAGE_CHILDREN), time.monotonic()
    subprocess.run([sys.executable, "-c", code, str(path)], check=True, cwd=ROOT, stdout=subprocess.DEVNULL)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return Row("none (command)", shards, kind, round(time.monotonic() - began, 1), round(cpu, 1), 0, 0, 0, {})


@contextmanager
def running(folder: Path, database: str) -> Iterator[Service]:
    with ExitStack() as stack:
        is_there = database == "postgresql"
        options = ["--database-url", stack.enter_context(postgres())] if is_there else []
        service = Service(folder)
        started = service.up(*options)
        assert started.returncode == 0, started.stdout + started.stderr
        try:
            yield service
        finally:
            service.command("down")


def page(rows: list[Row]) -> str:
    import prefect

    head = ["database", "shards", "run", "wall, s", "wall a shard, ms", "cpu of flow and slots, s", "cpu of server, s",
            "server, MiB", "all ends known after, s", "task runs"]  # fmt: skip
    lines = [f"{datetime.now():%Y-%m-%d}, {os.cpu_count()} cores, Python {platform.python_version()}, Prefect "
             f"{prefect.__version__}.", "", "| " + " | ".join(head) + " |", "|" + "---|" * len(head)]  # fmt: skip
    for row in rows:
        states = ", ".join(f"{count} {name}" for name, count in sorted(row.states.items()))
        cells = [row.database, f"{row.shards:,}", row.run, row.wall_s, round(1000 * row.wall_s / row.shards),
                 row.flow_cpu_s, row.server_cpu_s or "", row.server_mib or "", row.late_s or "", states]  # fmt: skip
        lines.append("| " + " | ".join(map(str, cells)) + " |")
    return "\n".join([*lines, ""])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0] if __doc__ else "")
    parser.add_argument("work", type=Path)
    parser.add_argument("--shards", type=int, nargs="+", default=[80, 325, 1300])
    parser.add_argument("--databases", default="stage,sqlite,postgresql")
    parser.add_argument("--out", type=Path, help="write the table to the top of this page")
    options = parser.parse_args()
    work: Path = options.work.resolve()
    log = work / "rows.jsonl"
    for database in options.databases.split(","):
        for shards in options.shards:
            asked = config(work, shards, work / f"{database}-{shards}-{datetime.now():%H%M%S}")
            with ExitStack() as stack:
                service = stack.enter_context(running(asked.out / "service", database)) if database != "stage" else None
                for kind in ("first", "all finished"):
                    row = flow_run(service, database, asked, kind, shards) if service else stage(asked, shards, kind)
                    print(row, flush=True)
                    with open(log, "a") as file:
                        file.write(json.dumps(asdict(row)) + "\n")
    text = page([Row(**json.loads(line)) for line in log.read_text().splitlines()])
    print(text)
    if options.out:
        renew(options.out, f"# Many shards through one flow run\n\n{text}")


if __name__ == "__main__":
    main()
