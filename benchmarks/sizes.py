"""What reading sizes from headers costs a picture beside a bare loop of Pillow, at N, 4N, 16N; and what it does not.

python benchmarks/sizes.py [--sizes 1000,4000,16000] [--repeats 3]

Contenders run in turn in fresh processes on a warm page cache. Costs a picture are over those of a command that reads
no picture.
"""

from __future__ import annotations

import argparse
import shutil
import statistics
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Iterator
from datetime import date
from itertools import cycle
from pathlib import Path

from made_pictures import KINDS, made_file
from measure import Cost, cost_of, free_cores, machine

FILES = [(kind, width, height) for kind in KINDS for width, height in ((256, 384), (384, 288))]
LOOP = """
import sys
from pathlib import Path
from PIL import Image
for path in sorted(Path(sys.argv[1]).glob("*/*.*"))[: int(sys.argv[2])]:
    if path.suffix != ".txt":
        with Image.open(path) as image:
            size = image.size
"""
OURS = [sys.executable, "-m", "sdxl_core.cli", "subset", "--query"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--sizes", default="1000,4000,16000")
    parser.add_argument("--repeats", type=int, default=3)
    options = parser.parse_args()
    print(f"# Sizes from headers\n\n`python benchmarks/sizes.py`, {date.today()}\n\n{machine()}\n")
    print(
        "| pictures | way | wall, s | cpu, s | us a picture over the start | of the loop's | private MiB | free cores |"
    )
    print("|---|---|---|---|---|---|---|---|")
    for size in map(int, options.sizes.split(",")):
        with tempfile.TemporaryDirectory(prefix="sizes_") as folder:
            make(Path(folder), size)
            measure(Path(folder), size, options.repeats)


def make(folder: Path, size: int) -> None:
    """Pictures of six kinds with tags, as a folder of folders of 1,000 and as a tar."""
    datas = [(kind, made_file(kind, width, height, number)) for number, (kind, width, height) in enumerate(FILES)]
    for number, (kind, data) in zip(range(size), cycle(datas), strict=False):
        path = folder / "in" / f"{number // 1000:03d}" / f"{number}.{kind.split()[0]}"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
        path.with_suffix(".txt").write_text("1girl, solo" if number % 100 else "1girl, solo, rare")
    (folder / "tars").mkdir()
    with tarfile.open(folder / "tars" / "0.tar", "w") as tar:
        tar.add(folder / "in", arcname="")
    for name, source in (("of folder", "in"), ("of tars", "tars")):
        command = ["catalog", "--sources", str(folder / source), "--out", str(folder / name)]
        subprocess.run([sys.executable, "-m", "sdxl_core.cli", *command], check=True, stdout=subprocess.DEVNULL)


def measure(folder: Path, size: int, repeats: int) -> None:
    costs: dict[str, list[Cost]] = {}
    free = [free_cores()]
    for _ in range(repeats):
        for name, command in contenders(folder, size):
            costs.setdefault(name, []).append(cost_of(command))
    free.append(free_cores())
    middle = {
        name: {field: statistics.median(getattr(cost, field) for cost in found) for field in Cost.__slots__}
        for name, found in costs.items()
    }

    def each(name: str, start: str) -> float:
        return (middle[name]["cpu_s"] - middle[start]["cpu_s"]) / size * 1e6

    loop = each("Pillow's loop", "the loop's start")
    for name, cost in middle.items():
        start = {"Pillow's loop": "the loop's start"}.get(
            name, name if name == "the loop's start" else f"{name.split(',')[0]}, tags only"
        )
        own = each(name, start)
        shown = f"{own:.0f} | {own / loop:.2f}" if start != name else "|"
        print(
            f"| {size} | {name} | {cost['wall_s']:.2f} | {cost['cpu_s']:.2f} | {shown} | {cost['private_mib']:.0f} | "
            f"{', '.join(f'{cores:.2f}' for cores in free)} |",
            flush=True,
        )


def contenders(folder: Path, size: int) -> Iterator[tuple[str, list[str]]]:
    """Names and commands; what must not be there is removed when its turn comes."""
    yield "the loop's start", [sys.executable, "-c", LOOP, str(folder / "in"), "0"]
    yield "Pillow's loop", [sys.executable, "-c", LOOP, str(folder / "in"), str(2 * size)]
    for name in ("of folder", "of tars"):
        catalog = str(folder / name)
        explain = ["--explain", "--source", catalog]
        for file in (folder / name / "parts").glob("*.sizes.arrow"):
            file.unlink()
        shutil.rmtree(folder / "picked", ignore_errors=True)
        yield f"catalog {name}, tags only", [*OURS, "solo", *explain]
        pick = [*OURS, "rare width:>=256", "--source", catalog, "--how", "manifest", "--out", str(folder / "picked")]
        yield f"catalog {name}, sizes of one in 100", pick
        for file in (folder / name / "parts").glob("*.sizes.arrow"):
            file.unlink()
        yield f"catalog {name}, all sizes", [*OURS, "solo width:>=384", *explain]
        yield f"catalog {name}, all sizes again", [*OURS, "solo width:>=384", *explain]


if __name__ == "__main__":
    main()
