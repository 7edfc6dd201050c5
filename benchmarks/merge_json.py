"""Joining 16 shards of a meta_lat.json: ours against reading, updating and dumping dictionaries, alternately.

python benchmarks/merge_json.py [--sizes 62500,250000,1000000] [--repeats 3]
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import tempfile
from pathlib import Path

import numpy as np
from measure import Cost, cost_of, free_cores, machine

NUM_SHARDS = 16
RIVAL = """
import json, sys
merged = {}
for path in sys.argv[2:]:
    with open(path) as file:
        merged.update(json.load(file))
with open(sys.argv[1], "w") as file:
    file.write(json.dumps(merged, indent=2))
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--sizes", default="62500,250000,1000000")
    parser.add_argument("--repeats", type=int, default=3)
    options = parser.parse_args()
    print(machine())
    print("\n| pictures | json, s wall / cpu | ours | ratio wall (min-max) | ratio cpu | json, private MiB | ours |")
    print("|---|---|---|---|---|---|---|")
    for size in map(int, options.sizes.split(",")):
        with tempfile.TemporaryDirectory(prefix="merge_json_") as folder:
            compare(Path(folder), size, options.repeats)


def compare(folder: Path, size: int, repeats: int) -> None:
    shards = make_shards(folder, size)
    os.sync()
    free_before = free_cores()
    contenders = {
        "theirs": [sys.executable, "-c", RIVAL, f"{folder}/theirs.json", *shards],
        "ours": [
            sys.executable,
            "-m",
            "sdxl_core.cli",
            "merge-json",
            "--out",
            f"{folder}/ours.json",
            "--sources",
            *shards,
        ],
    }
    memory = {name: cost_of(command).private_mib for name, command in contenders.items()}  # and warms what is cached
    costs: dict[str, list[Cost]] = {name: [] for name in contenders}
    for _ in range(repeats):
        for name, command in contenders.items():
            (folder / f"{name}.json").unlink()  # or the time to give back 576 MB of its own last run counts
            os.sync()  # neither waits for what the other left to be written
            costs[name].append(cost_of(command, memory=False))
    assert (folder / "theirs.json").read_bytes() == (folder / "ours.json").read_bytes()
    a, b = (
        {kind: statistics.median(getattr(cost, kind) for cost in costs[name]) for kind in ("wall_s", "cpu_s")}
        for name in ("theirs", "ours")
    )
    ratios = sorted(x.wall_s / y.wall_s for x, y in zip(costs["theirs"], costs["ours"], strict=True))
    print(
        f"| {size} | {a['wall_s']:.2f} / {a['cpu_s']:.2f} | {b['wall_s']:.2f} / {b['cpu_s']:.2f} "
        f"| {statistics.median(ratios):.1f} ({ratios[0]:.1f}-{ratios[-1]:.1f}) | {a['cpu_s'] / b['cpu_s']:.1f} "
        f"| {memory['theirs']:.0f} | {memory['ours']:.0f} |",
        flush=True,
    )
    print(f"\n{size}: free cores before {free_before:.2f}, after {free_cores():.2f}\n", file=sys.stderr)


def make_shards(folder: Path, size: int) -> list[str]:
    rng = np.random.default_rng(0)
    words = [f"tag_number_{number}" for number in range(2_000)]
    shards = []
    for shard in range(NUM_SHARDS):
        start, stop = (size * i // NUM_SHARDS for i in (shard, shard + 1))
        picks = rng.integers(0, len(words), (stop - start, 30))
        entries = {
            f"danbooru/{number}": {"tags": ", ".join(words[i] for i in row), "train_resolution": [1024, 1024]}
            for number, row in zip(range(start, stop), picks.tolist(), strict=True)
        }
        shards.append(f"{folder}/{shard:02d}.json")
        Path(shards[-1]).write_text(json.dumps(entries, indent=2))
    return shards


if __name__ == "__main__":
    main()
