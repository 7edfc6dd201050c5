"""Subsets of pairs (picture + tags): ours in each way against shutil.copy2, alternately, in fresh processes.

python benchmarks/subset_copy.py [--sizes 1000,4000,16000] [--repeats 3] [--folder DIR]
DIR on xfs or btrfs shows reflinks too.
"""

from __future__ import annotations

import argparse
import os
import shutil
import statistics
import sys
import tempfile
from pathlib import Path

import numpy as np
from measure import Cost, cost_of, machine

from sdxl_core.catalog.build import build_catalog
from sdxl_core.catalog.config import CatalogConfig, CatalogSource

RIVAL = """
import shutil, sys, time
from pathlib import Path
start = time.perf_counter()
source, out = map(Path, sys.argv[1:3])
out.mkdir()
for picture in sorted(source.glob("*.webp")):
    shutil.copy2(picture, out / picture.name)
    shutil.copy2(picture.with_suffix(".txt"), out / (picture.stem + ".txt"))
Path(sys.argv[-1]).write_text(str(time.perf_counter() - start))
"""
BARE = """
import fcntl, os, sys, time
from pathlib import Path
start = time.perf_counter()
source, out = sys.argv[1] + "/", sys.argv[2] + "/"
os.mkdir(out)
steps = dict.fromkeys(("open", "create", "clone", "utime", "close", "rename"), 0.0)
for name in sorted(os.listdir(source)):
    times = [time.perf_counter()]
    reading = os.open(source + name, os.O_RDONLY)
    status = os.fstat(reading)
    times.append(time.perf_counter())
    writing = os.open(out + ".partial", os.O_WRONLY | os.O_CREAT | os.O_EXCL)
    times.append(time.perf_counter())
    fcntl.ioctl(writing, 0x40049409, reading)
    times.append(time.perf_counter())
    os.utime(writing, ns=(status.st_mtime_ns, status.st_mtime_ns))
    times.append(time.perf_counter())
    os.close(writing)
    os.close(reading)
    times.append(time.perf_counter())
    os.rename(out + ".partial", out + name)
    times.append(time.perf_counter())
    for number, step in enumerate(steps):
        steps[step] += times[number + 1] - times[number]
Path(sys.argv[-1]).write_text(str(time.perf_counter() - start))
Path(sys.argv[-1] + ".steps").write_text(" ".join(f"{step} {1e6 * took:.0f}" for step, took in steps.items()))
"""
OURS = """
import sys, time
from pathlib import Path
import numpy as np
from sdxl_core.catalog.records import Catalog
from sdxl_core.subset.run import subset_records
start = time.perf_counter()
catalog = Catalog.open(Path(sys.argv[1]))
records, out = np.arange(catalog.num_records), Path(sys.argv[2])
subset_records(catalog, records, settings={"source": "s", "query": ""}, how=sys.argv[3], out=out)
Path(sys.argv[-1]).write_text(str(time.perf_counter() - start))
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--sizes", default="1000,4000,16000")
    parser.add_argument("--picture-bytes", type=int, default=30_000)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--ways", default="copy,hardlink,symlink,manifest")
    parser.add_argument("--folder", type=Path)
    options = parser.parse_args()
    print(machine())
    print(f"{options.picture_bytes} bytes a picture; times are of the work, without starting Python and importing\n")
    print("| pairs | way | s (min-max) | us a pair | shutil / it (min-max) | cpu, s, with the start | private MiB |")
    print("|---|---|---|---|---|---|---|")
    for size in map(int, options.sizes.split(",")):
        with tempfile.TemporaryDirectory(prefix="subset_copy_", dir=options.folder) as folder:
            compare(Path(folder), size, options)


def compare(folder: Path, size: int, options: argparse.Namespace) -> None:
    make_pairs(folder / "in", size, options.picture_bytes)
    build_catalog(CatalogConfig(sources=(CatalogSource(path=folder / "in"),), out=folder / "catalog"))
    commands = {"shutil": [sys.executable, "-c", RIVAL, f"{folder}/in", f"{folder}/out", f"{folder}/seconds"]}
    if "reflink" in options.ways:
        bare = [sys.executable, "-c", BARE, f"{folder}/in", f"{folder}/out", f"{folder}/seconds"]
        commands["bare reflink loop"] = bare
    for way in options.ways.split(","):
        commands[way] = [sys.executable, "-c", OURS, f"{folder}/catalog", f"{folder}/out", way, f"{folder}/seconds"]
    costs: dict[str, list[Cost]] = {way: [] for way in commands}
    seconds: dict[str, list[float]] = {way: [] for way in commands}
    for _ in range(options.repeats):
        for way, command in commands.items():
            costs[way].append(cost_of(command))
            seconds[way].append(float((folder / "seconds").read_text()))
            if way != "manifest":
                check(folder / "in", folder / "out", size)
            shutil.rmtree(folder / "out")
            os.sync()  # nobody pays for the files of the one before
    for way, times in seconds.items():
        ratios = [theirs / ours for theirs, ours in zip(seconds["shutil"], times, strict=True)]
        middle = statistics.median(times)
        print(
            f"| {size} | {way} | {middle:.3f} ({min(times):.3f}-{max(times):.3f}) | {middle / size * 1e6:.0f} "
            f"| {statistics.median(ratios):.1f} ({min(ratios):.1f}-{max(ratios):.1f}) "
            f"| {statistics.median(cost.cpu_s for cost in costs[way]):.2f} "
            f"| {statistics.median(cost.private_mib for cost in costs[way]):.0f} |",
            flush=True,
        )
    if (folder / "seconds.steps").exists():
        words = (folder / "seconds.steps").read_text().split()
        costs_of = (f"{step} {float(took) / size:.0f}" for step, took in zip(words[::2], words[1::2], strict=True))
        print(f"\nbare reflink loop, us a pair: {', '.join(costs_of)}\n", flush=True)


def make_pairs(folder: Path, size: int, picture_bytes: int) -> None:
    rng = np.random.default_rng(0)
    folder.mkdir()
    for number in range(size):
        (folder / f"{number}.webp").write_bytes(rng.bytes(picture_bytes))
        (folder / f"{number}.txt").write_text(", ".join(f"tag_{n}" for n in rng.integers(0, 9_000, 30)))


def check(source: Path, out: Path, size: int) -> None:
    for number in (0, size // 2, size - 1):
        for name in (f"{number}.webp", f"{number}.txt"):
            assert (out / name).read_bytes() == (source / name).read_bytes()


if __name__ == "__main__":
    main()
