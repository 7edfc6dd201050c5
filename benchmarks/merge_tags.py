"""Merging a folder of tag files into one JSON: ours against sd-scripts' way of doing it, in alternating runs.

    python benchmarks/merge_tags.py [--sizes 12500,50000,200000] [--repeats 5]

The rival below is written from the description of what sd-scripts does (docs of its metadata format): one directory
scan for each of ten extensions, sorted `Path` objects, one `read_text` a picture, everything held, one
`json.dumps(indent=2)` at the end. Ours is `merge_tags`, with its fsyncs and its resumable work folder. Both run in
fresh processes; wall time is that of the work, without interpreter start and imports.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import platform
import random
import shutil
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

from measure import Cost, cost_of, free_cores

RIVAL = """
import json
from pathlib import Path

def merge(folder, out):
    found = set()
    for extension in (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".PNG", ".JPG", ".JPEG", ".WEBP", ".BMP"):
        found.update(Path(folder).glob("*" + extension))
    metadata = {}
    for image in sorted(found):
        metadata.setdefault(image.stem, {})["tags"] = image.with_suffix(".txt").read_text("utf-8").strip()
    Path(out).write_text(json.dumps(metadata, indent=2))
"""
OURS = """
from pathlib import Path
from sdxl_core.config import MergeTagsConfig
from sdxl_core.dataset import forked
from sdxl_core.merge.plan import merge_tags

def merge(folder, out):
    if {one_process}:
        forked.num_processes = lambda num_wanted: 1
    merge_tags(MergeTagsConfig(source=Path(folder), out=Path(out)))
"""
BARE = """
import os

def merge(folder, out):
    with os.scandir(folder) as entries:
        names = sorted(entry.name for entry in entries if entry.is_file())
    paths = [f"{folder}/{name}" for name in names if name.endswith(".txt")]
    children = []
    for start in range(len(os.sched_getaffinity(0))):
        child = os.fork()
        if not child:
            for path in paths[start :: len(os.sched_getaffinity(0))]:
                handle = os.open(path, os.O_RDONLY)
                os.read(handle, os.fstat(handle).st_size + 1)
                os.close(handle)
            os._exit(0)
        children.append(child)
    for child in children:
        os.waitpid(child, 0)
"""
TIMED = """
import json, resource, sys, time
def usage(field):
    return [getattr(resource.getrusage(who), field) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
def cpu():
    return sum(usage("ru_utime") + usage("ru_stime"))
before, start = cpu(), time.perf_counter()
merge(sys.argv[1], sys.argv[2])
wall = time.perf_counter() - start
print(json.dumps({"wall_s": wall, "cpu_s": cpu() - before}))
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--sizes", default="12500,50000,200000")
    parser.add_argument("--repeats", type=int, default=3)
    arguments = parser.parse_args()
    print_machine()
    os.environ.update(PYTHONPATH=str(Path(__file__).parents[1]), OMP_NUM_THREADS="1")
    print(
        "| pictures | what | wall, s | rival / it, wall (min–max) | cpu, s | rival / it, cpu "
        "| all processes, private, MiB | RSS, MiB |"
    )
    print("|---|---|---|---|---|---|---|---|")
    for num_images in map(int, arguments.sizes.split(",")):
        with tempfile.TemporaryDirectory(prefix="merge_tags_") as folder:
            compare(Path(folder), num_images, arguments.repeats)


def print_machine() -> None:
    models = [
        line.split(":")[1].strip() for line in Path("/proc/cpuinfo").read_text().splitlines() if "model name" in line
    ]
    print(f"{len(os.sched_getaffinity(0))} × {models[0] if models else platform.machine()}, {platform.platform()}, ")
    print(f"Python {platform.python_version()}, temporary folder on {file_system(Path(tempfile.gettempdir()))}, ")
    print(f"load before: {os.getloadavg()[0]:.1f}\n")


def file_system(path: Path) -> str:
    done = subprocess.run(["df", "--output=fstype", path], capture_output=True, text=True, check=True)
    return done.stdout.split()[-1]


def compare(folder: Path, num_images: int, repeats: int) -> None:
    """One table row for each contender; the rival and ours run in turn, so that noise meets all of them."""
    make_collection(folder / "in", num_images)
    os.sync()
    contenders = {
        "sd-scripts' way": RIVAL,
        "ours": OURS.replace("{one_process}", "False"),
        "ours, one process": OURS.replace("{one_process}", "True"),
        "ours, second run": OURS.replace("{one_process}", "False"),
        "listing and reading alone": BARE,  # no text is looked at, nothing is written: what no Python can undercut
    }
    memory: dict[str, Cost] = {}  # in a run of its own, which warms the page cache and the bytecode too
    for name, code in contenders.items():
        if not name.endswith("second run"):
            shutil.rmtree(folder / "warm", ignore_errors=True)
        memory[name] = memory_of(code, folder / "in", folder / "warm" / "out.json")
    results: dict[str, list[dict[str, float]]] = {name: [] for name in contenders}
    free_before = free_cores()
    for _ in range(repeats):
        for name, code in contenders.items():
            if name == "listing and reading alone":
                results[name].append(measure(code, folder / "in", folder / "out" / "none"))
                continue
            if not name.endswith("second run"):
                shutil.rmtree(folder / "out", ignore_errors=True)
            results[name].append(measure(code, folder / "in", folder / "out" / "out.json"))
            with open(folder / "out" / "out.json", "rb") as file:
                digest = hashlib.file_digest(file, "sha256").hexdigest()
            if name == "sd-scripts' way":
                expected = digest
            assert digest == expected, f"{name}: other bytes"
    rival = results["sd-scripts' way"]
    for name, runs in results.items():
        ratios = {
            unit: sorted(theirs[unit] / own[unit] for theirs, own in zip(rival, runs, strict=True))
            for unit in ("wall_s", "cpu_s")
        }
        middle = {unit: statistics.median(run[unit] for run in runs) for unit in runs[0]}
        print(
            f"| {num_images} | {name} | {middle['wall_s']:.3f} | {statistics.median(ratios['wall_s']):.1f} "
            f"({ratios['wall_s'][0]:.1f}–{ratios['wall_s'][-1]:.1f}) | {middle['cpu_s']:.3f} | "
            f"{statistics.median(ratios['cpu_s']):.1f} | {memory[name].private_mib:.0f} | {memory[name].rss_mib:.0f} |",
            flush=True,
        )
    print(f"\n{num_images}: free cores before {free_before:.2f}, after {free_cores():.2f}\n", file=sys.stderr)


def make_collection(folder: Path, num_images: int) -> None:
    """Empty pictures (merging does not open them) and tag files of 10 to 60 tags; one in 50 is not ASCII."""
    rng = random.Random(0)
    words = [f"{a} {b}" for a in ("long", "blue", "open", "white", "ribbon") for b in ("hair", "eyes", "sky")]
    folder.mkdir(parents=True)
    for number in range(num_images):
        (folder / f"{number:07}.webp").touch()
        tags = [f"{rng.choice(words)} {rng.randrange(1000)}" for _ in range(rng.randint(10, 60))]
        if number % 50 == 0:
            tags.append("pokémon, 日本")
        (folder / f"{number:07}.txt").write_text(", ".join(tags) + "\n", "utf-8")


def command_of(code: str, folder: Path, out: Path) -> list[str]:
    out.parent.mkdir(exist_ok=True)
    return [sys.executable, "-c", code + TIMED, str(folder), str(out)]


def memory_of(code: str, folder: Path, out: Path) -> Cost:
    """Private and resident memory of all processes together, with the interpreter and its imports."""
    return cost_of(command_of(code, folder, out))


def measure(code: str, folder: Path, out: Path) -> dict[str, float]:
    done = subprocess.run(command_of(code, folder, out), capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit(done.stderr)
    result: dict[str, float] = json.loads(done.stdout)
    return result


if __name__ == "__main__":
    main()
