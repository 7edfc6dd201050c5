"""Subsets of pairs (picture + tags): ours in each way against shutil.copy2, alternately, in fresh processes.

python benchmarks/subset_copy.py [--sizes 2000,8000,32000] [--repeats 3] [--folder DIR]
DIR on xfs or btrfs shows reflinks too.
"""

from __future__ import annotations

import argparse
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
import shutil, sys
from pathlib import Path
source, out = map(Path, sys.argv[1:])
out.mkdir()
for picture in sorted(source.glob("*.webp")):
    shutil.copy2(picture, out / picture.name)
    shutil.copy2(picture.with_suffix(".txt"), out / (picture.stem + ".txt"))
"""
OURS = """
import sys
from pathlib import Path
import numpy as np
from sdxl_core.catalog.records import Catalog
from sdxl_core.subset.run import subset_records
catalog = Catalog.open(Path(sys.argv[1]))
subset_records(catalog, np.arange(catalog.num_records), query="", how=sys.argv[3], out=Path(sys.argv[2]))
"""
NOTHING = "import numpy, pyarrow; from sdxl_core.subset.run import subset_records"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--sizes", default="2000,8000,32000")
    parser.add_argument("--picture-bytes", type=int, default=30_000)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--ways", default="copy,hardlink,symlink,manifest")
    parser.add_argument("--folder", type=Path)
    options = parser.parse_args()
    print(machine())
    start = statistics.median(cost_of([sys.executable, "-c", NOTHING]).wall_s for _ in range(3))
    print(f"{options.picture_bytes} bytes a picture; starting Python and importing takes {start:.2f} s of our times\n")
    print("| pairs | way | wall, s (min-max) | shutil / it (min-max) | without the start | us a pair | cpu, s | MiB |")
    print("|---|---|---|---|---|---|---|---|")
    for size in map(int, options.sizes.split(",")):
        with tempfile.TemporaryDirectory(prefix="subset_copy_", dir=options.folder) as folder:
            compare(Path(folder), size, options, start)


def compare(folder: Path, size: int, options: argparse.Namespace, start: float) -> None:
    make_pairs(folder / "in", size, options.picture_bytes)
    build_catalog(CatalogConfig(sources=(CatalogSource(path=folder / "in"),), out=folder / "catalog"))
    commands = {"shutil": [sys.executable, "-c", RIVAL, f"{folder}/in", f"{folder}/out"]}
    for way in options.ways.split(","):
        commands[way] = [sys.executable, "-c", OURS, f"{folder}/catalog", f"{folder}/out", way]
    costs: dict[str, list[Cost]] = {way: [] for way in commands}
    for _ in range(options.repeats):
        for way, command in commands.items():
            costs[way].append(cost_of(command))
            if way != "manifest":
                check(folder / "in", folder / "out", size)
            shutil.rmtree(folder / "out")
    for way, of_way in costs.items():
        walls = [cost.wall_s for cost in of_way]
        ratios = [rival.wall_s / cost.wall_s for rival, cost in zip(costs["shutil"], of_way, strict=True)]
        working = [rival.wall_s / (cost.wall_s - start) for rival, cost in zip(costs["shutil"], of_way, strict=True)]
        net = statistics.median(walls) - (0 if way == "shutil" else start)
        print(
            f"| {size} | {way} | {statistics.median(walls):.2f} ({min(walls):.2f}-{max(walls):.2f}) "
            f"| {statistics.median(ratios):.1f} ({min(ratios):.1f}-{max(ratios):.1f}) "
            f"| {'' if way == 'shutil' else f'{statistics.median(working):.1f}'} | {net / size * 1e6:.0f} "
            f"| {statistics.median(cost.cpu_s for cost in of_way):.2f} "
            f"| {statistics.median(cost.private_mib for cost in of_way):.0f} |",
            flush=True,
        )


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
