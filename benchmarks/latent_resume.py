"""Resuming a finished latent set: what planning, joining and coming back cost for millions of pictures.

    python benchmarks/latent_resume.py [WORK] [--rows 12400000]

Five minutes on two quiet cores, most of it for making what is resumed then; WORK keeps it for the next run.
Makes a set as cache-latents leaves it, but for the latents: plan, ledgers and index are made by the code that is
measured, the packed files are sparse and of the right size. Rows at N, 4N and 16N = --rows; they need about 700 bytes
a row. Every step is a process of its own, interpreter start and imports included.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
from measure import Aim, Cost, aims_table, cost_of, machine

from sdxl_core.buckets import Bucket, BucketTable, crop_ltrb
from sdxl_core.config import BucketOptions, CacheLatentsConfig
from sdxl_core.latents.cache import join_latents, plan_latents, shard_is_finished
from sdxl_core.latents.ledger import CommitGroup, LatentFile, ShardLedger
from sdxl_core.refs import ShardRef
from sdxl_core.subset.manifest import ROWS, write_manifest

SHARD_SIZE, COMMIT_SIZE, TAR_ROWS, NUM_BUCKETS = 16_384, 4_096, 10_000, 25
PARTS = os.cpu_count() or 1
BYTES_A_ROW = 2 * 4 * 128 * 128
AIM_S = 10  # asked for: resuming 12.4 million finished pictures


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("work", type=Path, nargs="?", help="a folder for the sets (default: one that is removed)")
    parser.add_argument("--rows", type=int, default=12_400_000)
    parser.add_argument("--step", choices=["manifest", "metadata", "plan", "ledgers", "join", "look"])
    parser.add_argument("--part", type=int, default=0)
    options = parser.parse_args()
    if options.step:
        STEPS[options.step](config_of(options.work, options.rows), options)
        return
    print(f"{machine()}; load before: {Path('/proc/loadavg').read_text().split()[0]}\n")
    print("| pictures | packed files | step | wall, s | cpu, s | private, MiB | with mapped pages, MiB |")
    print("|---|---|---|---|---|---|---|")
    with tempfile.TemporaryDirectory(prefix="latent_resume_") as folder:
        sizes = (options.rows // 16, options.rows // 4, options.rows)
        found = []
        for rows in sizes:
            found.append(measure(options.work or Path(folder), rows))
            if options.work is None:
                shutil.rmtree(config_of(Path(folder), rows).source)
    shown = ", ".join(f"{resume.wall_s:.1f}" for resume, _ in found)
    told = f"at {', '.join(f'{rows:,}' for rows in sizes)} pictures"
    last, noticed = found[-1]
    aims = [
        Aim(f"resume {told}: the whole command", f"{AIM_S} s", f"{shown} s", last.wall_s <= AIM_S),
        Aim("one file gone, one shortened", "noticed", noticed, noticed.startswith("2 of")),
    ]
    print("\n".join(["", *aims_table(aims)]))


def measure(work: Path, rows: int) -> tuple[Cost, str]:
    """The cost of resuming, and what is said of a missing and a shortened file."""
    config = config_of(work, rows)
    if not (config.out / "meta_lat.json").exists():
        shutil.rmtree(config.out, ignore_errors=True)
        config.out.mkdir(parents=True)
        at_once(step_of(work, rows, "manifest"), step_of(work, rows, "metadata"))
        row(rows, None, "first plan", cost_of(step_of(work, rows, "plan")))
        at_once(*(step_of(work, rows, "ledgers", part) for part in range(PARTS)))
        row(rows, None, "join: meta_lat.json and index", cost_of(step_of(work, rows, "join")))
    files = sum(1 for _ in (config.out / "latents" / "packed").glob("*/*.npz"))
    command = [
        sys.executable, "-m", "sdxl_core.cli", "cache-latents", "--source", str(config.source), "--manifest",
        str(config.manifest), "--metadata", str(config.metadata), "--out", str(config.out), "--vae", "tiny", "--layout",
        "packed",
        "--shard-size", str(SHARD_SIZE), "--commit-size", str(COMMIT_SIZE),
    ]  # fmt: skip
    costs = sorted((cost_of(command) for _ in range(3)), key=lambda cost: cost.wall_s)
    row(rows, files, "resume: nothing to do (median of 3)", costs[1])
    victims = sorted((config.out / "latents" / "packed").glob("*/*.npz"))[:: files // 2][:2]
    sizes = [path.stat() for path in victims]
    victims[0].unlink()
    os.truncate(victims[1], sizes[1].st_size - 1)
    told = subprocess.check_output(step_of(work, rows, "look"), text=True).strip()
    print(f"| {rows:,} | {files:,} | one file gone, one shortened: {told} | | | | |")
    for path, status in zip(victims, sizes, strict=True):
        sparse(path, status.st_size, status.st_mtime_ns)
    return costs[1], told


def step_of(work: Path, rows: int, step: str, part: int = 0) -> list[str]:
    """The command of a step, or of a part of it."""
    return [sys.executable, __file__, str(work), "--rows", str(rows), "--step", step, "--part", str(part)]


def at_once(*commands: Sequence[str]) -> None:
    """What is not measured has all cores."""
    for process in [subprocess.Popen(command) for command in commands]:
        if process.wait():
            raise subprocess.CalledProcessError(process.returncode, process.args)


def row(rows: int, files: int | None, step: str, cost: Cost) -> None:
    numbers = f"{cost.wall_s:,.1f} | {cost.cpu_s:,.1f}"
    memory = f"{cost.private_mib:,.0f} | {cost.rss_mib:,.0f}"
    print(f"| {rows:,} | {f'{files:,}' if files else ''} | {step} | {numbers} | {memory} |", flush=True)


def config_of(work: Path, rows: int) -> CacheLatentsConfig:
    folder = work / f"rows-{rows}"
    return CacheLatentsConfig(
        source=folder, manifest=folder / "manifest.arrow", metadata=folder / "meta_cap_dd.json", out=folder / "out",
        vae="tiny", layout="packed", shard_size=SHARD_SIZE, commit_size=COMMIT_SIZE, devices="auto",
    )  # fmt: skip


def make_manifest(config: CacheLatentsConfig, options: argparse.Namespace) -> None:
    """Pictures in tars."""
    rows = options.rows

    def batches() -> Iterator[pa.RecordBatch]:
        for start in range(0, rows, 65_536):
            numbers = np.arange(start, min(start + 65_536, rows))
            keys = [str(number) for number in numbers.tolist()]
            columns = [
                keys, numbers, np.zeros(len(numbers), np.int32), [f"{key}.webp" for key in keys],
                [f"{number // TAR_ROWS:04}.tar" for number in numbers.tolist()],
                numbers % TAR_ROWS * 200_000, np.full(len(numbers), 190_000),
            ]  # fmt: skip
            arrays = [pa.array(column, field.type) for column, field in zip(columns, ROWS, strict=True)]
            yield pa.RecordBatch.from_arrays(arrays, schema=ROWS)

    assert config.manifest is not None
    write_manifest(
        config.manifest, batches(), catalog=config.source, catalog_digest="0", query="", roots=[config.source]
    )


def make_metadata(config: CacheLatentsConfig, options: argparse.Namespace) -> None:
    """A metadata JSON in the order of the manifest."""
    with open(config.metadata, "w") as file:
        for number in range(options.rows):
            comma = "{" if number == 0 else ","
            file.write(f'{comma}\n  "{number}": {{\n    "tags": "1girl, solo, tag {number % 997}"\n  }}')
        file.write("\n}")


def make_ledgers(config: CacheLatentsConfig, options: argparse.Namespace) -> None:
    """What encoding leaves: a sparse file for each bucket of each commit group, and a line about them."""
    table = BucketTable.from_options(BucketOptions(max_bucket_px=1024)).buckets
    buckets = table[:NUM_BUCKETS]
    for folder in {f"{bucket.width_px}x{bucket.height_px}" for bucket in buckets}:
        (config.out / "latents" / "packed" / folder).mkdir(parents=True, exist_ok=True)
    crops = [crop_ltrb(bucket, width_px=1000, height_px=1200) for bucket in buckets]
    for shard in plan_latents(config).shards[options.part :: PARTS]:
        ledger = ShardLedger.read(shard.path, shard.stop - shard.start)
        for number, start in enumerate(range(0, shard.stop - shard.start, COMMIT_SIZE)):
            rows = np.arange(start, min(start + COMMIT_SIZE, shard.stop - shard.start))
            ledger.commit(group_of(config, shard, number, rows, buckets, crops))
        ledger.close({"images_per_s": 80.0, "bound_by": "vae", "seconds": {}, "device": "0"})


def group_of(
    config: CacheLatentsConfig, shard: ShardRef, number: int, rows: np.ndarray, buckets: tuple[Bucket, ...], crops: list
) -> CommitGroup:
    which = np.random.default_rng([shard.index, number]).integers(0, len(buckets), len(rows))
    at, files = np.zeros(len(rows), np.int64), []
    for place, bucket in enumerate(buckets):
        mine = np.flatnonzero(which == place)
        at[mine] = np.arange(len(mine))
        path = f"packed/{bucket.width_px}x{bucket.height_px}/{shard.digest[:16]}-{number}.npz"
        size = len(mine) * BYTES_A_ROW
        files.append(LatentFile(path, size, sparse(config.out / "latents" / path, size), 7))
    return CommitGroup(
        number=number, files=files, rows=rows.tolist(), file=which.tolist(), at=at.tolist(),
        crc32=(rows * 7919).tolist(),
        bucket=[(buckets[p].width_px, buckets[p].height_px) for p in which.tolist()], size=[(1000, 1200)] * len(rows),
        crop=[crops[p] for p in which.tolist()],
    )  # fmt: skip


def sparse(path: Path, size: int, mtime_ns: int | None = None) -> int:
    """A file without content. Returns its time."""
    with open(path, "wb") as file:
        file.truncate(size)
    if mtime_ns is not None:
        os.utime(path, ns=(mtime_ns, mtime_ns))
    return path.stat().st_mtime_ns


def look(config: CacheLatentsConfig, _: argparse.Namespace) -> None:
    started = time.perf_counter()
    plan = plan_latents(config)
    left = [shard.index for shard in plan.shards if shard_is_finished(shard, config) is None]
    print(f"{len(left)} of {len(plan.shards)} shards are not finished, found in {time.perf_counter() - started:.1f} s")


STEPS = {
    "manifest": make_manifest,
    "metadata": make_metadata,
    "plan": lambda config, _: plan_latents(config),
    "ledgers": make_ledgers,
    "join": lambda config, _: join_latents(config, plan_latents(config)),
    "look": look,
}

if __name__ == "__main__":
    main()
