"""Kills at random moments of a real pipeline, and what each costs: `make bench-chaos`, or round by round.

A service of its own (`sdxl-flows up --detach`) runs the pipeline on small drawn pictures: two encoding slots, then a
trainer. One kill a round, SIGKILL, at a moment drawn from a fixed seed; then nobody touches anything but what comes
back by itself: `up` starts server and worker again, and is started again itself after a power cut, as systemd would.
A round that ran before is not run again, so the benchmark can be stopped and continued. Encoded pictures and trained
steps are counted where they begin (benchmarks/counting).
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import random
import signal
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import asdict, dataclass
from datetime import datetime
from hashlib import sha256
from pathlib import Path
from typing import Any
from uuid import UUID

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "tests"))
from measure import renew  # noqa: E402
from support.run_processes import in_role, processes_of  # noqa: E402
from support.service import Service  # noqa: E402

from sdxl_core.demo import draw_samples  # noqa: E402

SEED, ROUNDS, STEPS = 6, 10, 40
KINDS = ("slot", "flow", "worker", "worker and flow", "trainer", "server", "power cut")
ROUND_LIMIT_S = 900
LOOK_EVERY_S = 0.25


@dataclass(frozen=True)
class Round:
    """What was killed and how it went on. Seconds from the kill on; `moment`: what was done of the run by then."""

    number: int
    killed: str
    moment: str
    num_processes: int
    noticed_s: float
    noticed_as: str
    working_s: float
    finished_s: float
    pictures_again: int
    steps_again: int
    states: list[str]
    differences: list[str]


def plan(number: int, seed: int) -> tuple[str, float, float]:
    """What round `number` kills, after which share of the work, and a pause in seconds on top of that."""
    rng = random.Random(seed)
    kinds = list(KINDS) + [rng.choice(KINDS) for _ in range(ROUNDS - len(KINDS))]
    rng.shuffle(kinds)
    rng = random.Random(f"{seed}/{number}")
    kind = kinds[(number - 1) % len(kinds)]
    low, high = {"slot": (0.0, 0.45), "trainer": (0.5, 0.95)}.get(kind, (0.0, 0.95))
    return kind, rng.uniform(low, high), rng.uniform(0, 1)


def job(folder: Path, out: Path) -> dict[str, Any]:
    """Half of the work is encoding, half is training."""
    return {
        "out": str(out),
        "source": {"path": str(folder / "pictures")},
        "subset": {"query": "scenery"},
        "merge": {"num_shards": 2},
        "latents": {"resolution_px": 768, "shard_size": 13, "commit_size": 4, "devices": "cpu,cpu"},
        "train": {
            "base_model": "tiny", "max_train_steps": STEPS, "train_batch_size": 1, "save_every_steps": 5,
            "learning_rate": 2e-4, "shuffle_caption": True, "use_cpu": True, "mixed_precision": "no",
        },
    }  # fmt: skip


class Run:
    """A run of the pipeline on the service, watched from outside: by its files, its processes and the API."""

    def __init__(self, service: Service, out: Path) -> None:
        self.service, self.out = service, out
        self.id: UUID = service.submit("pipeline/pipeline", {"job": job(out.parent, out)})

    def committed(self) -> int:
        return len(list((self.out / "latents").glob("*.npz")))

    def step(self) -> int:
        try:
            return int(json.loads((self.out / "state" / "progress.json").read_bytes())["step"])
        except (FileNotFoundError, json.JSONDecodeError):
            return 0

    def share_done(self, num_pictures: int) -> float:
        return 0.5 * min(1, self.committed() / num_pictures) + 0.5 * self.step() / STEPS

    def pids(self, role: str) -> set[int]:
        pool = set(self.service.processes()) if role in ("worker", "server") else processes_of(self.id)
        return in_role(role, pool)

    def states(self) -> list[Any]:
        with self.service.client() as client:
            return sorted(client.read_flow_run_states(self.id), key=lambda state: state.timestamp)

    def is_finished(self) -> bool:
        states = self.states()
        assert not (states and states[-1].is_failed()), states[-1]
        return bool(states) and states[-1].is_completed()


def started_work(count: Path) -> Counter[str]:
    """Pictures and steps that were begun since the file was last removed."""
    found: Counter[str] = Counter()
    for line in count.read_text().splitlines() if count.exists() else []:
        word, number, _ = line.split()
        found[word] += int(number)
    return found


def workers(count: Path) -> set[str]:
    """The processes that have begun work."""
    return {line.split()[2] for line in count.read_text().splitlines()} if count.exists() else set()


def wait(look: Callable[[], Any], what: str, *, limit_s: float = ROUND_LIMIT_S) -> float:
    """Seconds until `look` is true; a server that does not answer is asked again."""
    started = time.monotonic()
    while time.monotonic() - started < limit_s:
        try:
            if look():
                return time.monotonic() - started
        except OSError:
            pass
        except Exception as error:
            if "connect" not in f"{type(error).__name__} {error}".lower():
                raise
        time.sleep(LOOK_EVERY_S)
    raise SystemExit(f"{what}: not within {limit_s:.0f} s")


class Watch(threading.Thread):
    """After a kill: when a sign of notice came first, and when work went on.

    Args: there: the processes that were there before the kill, by role.   begun: those that had begun work.
    """

    def __init__(self, run: Run, kind: str, there: dict[str, set[int]], begun: set[str], count: Path) -> None:
        super().__init__(daemon=True)
        self.run_, self.kind, self.there, self.begun, self.count = run, kind, there, begun, count
        self.before = started_work(count)
        self.began, self.began_at = time.monotonic(), time.time()
        self.noticed: tuple[float, str] | None = None
        self.working_s: float | None = None

    def run(self) -> None:
        while self.noticed is None or self.working_s is None:
            now = time.monotonic() - self.began
            if self.working_s is None and self._works():
                self.working_s = now
            if self.noticed is None:
                self.noticed = self._sign(now)
            time.sleep(LOOK_EVERY_S)

    def _works(self) -> bool:
        """Whether a process began work that had not before; where the work itself was not killed, any one."""
        if self.kind in ("worker", "server"):
            return started_work(self.count) != self.before
        return bool(workers(self.count) - self.begun)

    def _sign(self, now: float) -> tuple[float, str] | None:
        if self.kind in self.there and self.run_.pids(self.kind) - self.there[self.kind]:
            return now, "a new process"
        try:
            late = [state for state in self.run_.states() if state.timestamp.timestamp() > self.began_at]
        except Exception:  # no server at the moment
            return None
        named = [state for state in late if state.name in ("Crashed", "AwaitingRetry")]
        return (named[0].timestamp.timestamp() - self.began_at, f"run {named[0].name}") if named else None


def kill(run: Run, kind: str) -> set[int]:
    """SIGKILL to what the round is about. Returns the processes."""
    if kind == "power cut":
        targets = set(run.service.processes()) | processes_of(run.id)
    elif kind == "worker and flow":
        targets = run.pids("worker") | run.pids("flow")
    elif kind == "slot":
        targets = {min(run.pids("slot"))}
    else:
        targets = run.pids(kind)
    assert targets, f"no {kind} to kill"
    for pid in sorted(targets):
        try:
            os.kill(pid, signal.SIGKILL)
        except ProcessLookupError:
            continue
    return targets


def one_round(service: Service, folder: Path, number: int, seed: int) -> Round:
    """Run the pipeline, kill, wait until it has finished by itself, compare."""
    expected = json.loads((folder / "undisturbed.json").read_text())
    kind, share, pause_s = plan(number, seed)
    out, count = folder / f"round-{number}", folder / "count"
    count.unlink(missing_ok=True)
    run = Run(service, out)
    print(f"round {number}: {kind}, after {share:.0%} of the work and {pause_s:.1f} s", flush=True)
    role = {"slot": "slot", "trainer": "trainer"}.get(kind, "flow")
    wait(lambda: run.share_done(expected["pictures"]) >= share and run.pids(role), f"{share:.0%} of the work")
    time.sleep(pause_s)
    moment = f"{run.committed()} latents, step {run.step()}"
    there = {role: run.pids(role) for role in ("slot", "trainer", "worker", "server")}
    begun = workers(count)
    killed = kill(run, kind)
    watch = Watch(run, kind, there, begun, count)
    watch.start()
    began = time.monotonic()
    if kind == "power cut":
        up(service)
    wait(run.is_finished, f"round {number}, {kind}: the end of the run")
    finished_s = time.monotonic() - began
    watch.join(timeout=5)
    noticed_s, noticed_as = watch.noticed or (float("nan"), "no sign seen")
    work = started_work(count)
    return Round(
        number, kind, moment, len(killed), round(noticed_s, 1), noticed_as,
        round(watch.working_s if watch.working_s is not None else float("nan"), 1), round(finished_s, 1),
        work["encode"] - expected["pictures"], work["step"] - STEPS, [state.name for state in run.states()],
        differences(digests(out), expected["digests"]),
    )  # fmt: skip


def digests(out: Path) -> dict[str, str]:
    """SHA-256 of latents and metadata as files, and of the checkpoint's tensors: its header tells its run and date."""
    found = {f"latents/{path.name}": _sha256(path.read_bytes()) for path in (out / "latents").glob("*.npz")}
    found |= {name: _sha256((out / name).read_bytes()) for name in ("meta_cap_dd.json", "meta_lat.json")}
    data = (out / "model" / "last.safetensors").read_bytes()
    header_bytes = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + header_bytes])
    header.pop("__metadata__")
    found["checkpoint"] = _sha256(json.dumps(header, sort_keys=True).encode() + data[8 + header_bytes :])
    return found


def _sha256(data: bytes) -> str:
    return sha256(data).hexdigest()


def differences(found: dict[str, str], expected: dict[str, str]) -> list[str]:
    return sorted(name for name in found.keys() | expected.keys() if found.get(name) != expected.get(name))


def undisturbed(service: Service, folder: Path) -> None:
    """The run that all others are compared with. Raises: AssertionError: the counter is wrong."""
    if (folder / "undisturbed.json").exists():
        return
    count = folder / "count"
    count.unlink(missing_ok=True)
    run, began = Run(service, folder / "undisturbed"), time.monotonic()
    wait(run.is_finished, "the undisturbed run")
    work, pictures = started_work(count), run.committed()
    assert (work["encode"], work["step"]) == (pictures, STEPS), work
    seconds = round(time.monotonic() - began, 1)
    text = json.dumps({"pictures": pictures, "seconds": seconds, "digests": digests(run.out)})
    (folder / "undisturbed.json").write_text(text)
    print(f"undisturbed: {pictures} pictures, {STEPS} steps, {seconds} s", flush=True)


def up(service: Service) -> None:
    started = service.up()
    assert started.returncode == 0, started.stdout + started.stderr


def read_rounds(folder: Path) -> dict[int, Round]:
    lines = (folder / "rounds.jsonl").read_text().splitlines() if (folder / "rounds.jsonl").exists() else []
    return {row["number"]: Round(**row) for row in map(json.loads, lines)}


def table(folder: Path, seed: int) -> str:
    """The top of benchmarks/chaos.md."""
    import prefect

    expected = json.loads((folder / "undisturbed.json").read_text())
    head = ["round", "killed (SIGKILL)", "when: done by then", "noticed, s", "by", "working again, s", "finished, s",
            "pictures encoded again", "steps trained again", "latents, metadata, checkpoint"]  # fmt: skip
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    for number, row in sorted(read_rounds(folder).items()):
        same = "identical" if not row.differences else f"{len(row.differences)} DIFFER: {row.differences[0]} …"
        killed = f"{row.killed} ({row.num_processes} process{'es' if row.num_processes > 1 else ''})"
        cells = [number, killed, row.moment, row.noticed_s, row.noticed_as, row.working_s, row.finished_s,
                 row.pictures_again, row.steps_again, same]  # fmt: skip
        lines.append("| " + " | ".join(map(str, cells)) + " |")
    told = (
        f"Seed {seed}, {datetime.now():%Y-%m-%d}, {os.cpu_count()} cores, Python {platform.python_version()}, Prefect "
        f"{prefect.__version__}, SQLite. Undisturbed: {expected['pictures']} pictures, {STEPS} steps, "
        f"{expected['seconds']} s."
    )
    return "\n".join([told, "", *lines, ""])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0] if __doc__ else "")
    parser.add_argument("--folder", type=Path, default=ROOT / "out" / "chaos", help="what was run is kept here")
    parser.add_argument("--round", type=int, help="this round only; left out: all that were not run yet")
    parser.add_argument("--seed", type=int, default=SEED)
    parser.add_argument("--page", type=Path, help="write the table to the top of this page")
    options = parser.parse_args()
    folder: Path = options.folder.resolve()
    draw_samples(folder / "pictures")
    service = Service(folder)
    service.environment |= {
        "CHAOS_COUNT": str(folder / "count"), "SDXL_FLOWS_DATA_ROOTS": "",
        "PYTHONPATH": os.pathsep.join([str(ROOT / "benchmarks" / "counting"), str(ROOT)]),
    }  # fmt: skip
    up(service)
    try:
        undisturbed(service, folder)
        for number in [options.round] if options.round else range(1, ROUNDS + 1):
            if number not in read_rounds(folder):
                row = one_round(service, folder, number, options.seed)
                with open(folder / "rounds.jsonl", "a") as file:
                    file.write(json.dumps(asdict(row)) + "\n")
                print(row, flush=True)
    finally:
        service.command("down")
    text = table(folder, options.seed)
    print(text)
    if options.page:
        renew(options.page, f"# Kills at random moments, and what each costs\n\n{text}")


if __name__ == "__main__":
    main()
