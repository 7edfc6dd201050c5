"""Manifest and statistics of a catalog: time and memory at N, 4N, 16N.

python benchmarks/subset_manifest.py [--sizes 100000,400000,1600000] [--repeats 3]
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from measure import Cost, cost_of, machine

from sdxl_core.catalog.build import join_catalog
from sdxl_core.catalog.config import CatalogConfig, CatalogSource
from sdxl_core.catalog.parts import PartWriter, TagColumn
from sdxl_core.catalog.schema import PART_ROWS
from sdxl_core.files import digest_of
from sdxl_core.refs import CatalogPartRef
from sdxl_core.rejected import write_rejected

NUM_TAGS, TAGS_A_RECORD = 100_000, 30
START = """
import sys
from pathlib import Path
import numpy as np
from sdxl_core.catalog.records import Catalog
from sdxl_core.statistics.collect import collect_statistics
from sdxl_core.subset.manifest import Manifest
from sdxl_core.subset.run import subset_records
folder = Path(sys.argv[1])
catalog = Catalog.open(folder / "catalog")
records = np.arange(catalog.num_records)
settings = {"source": "s", "query": ""}
"""
STEPS = {
    "start, record numbers": "",
    "manifest": 'subset_records(catalog, records, settings=settings, how="manifest", out=folder / "out")',
    "manifest, again": 'subset_records(catalog, records, settings=settings, how="manifest", out=folder / "out")',
    "10,000 rows of it": """
manifest = Manifest.open(folder / "out")
for row in np.random.default_rng(0).integers(0, manifest.num_records, 10_000).tolist():
    manifest.place(row)""",
    "statistics, 2 processes": "collect_statistics(catalog)",
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--sizes", default="100000,400000,1600000")
    parser.add_argument("--repeats", type=int, default=3)
    options = parser.parse_args()
    print(machine())
    print(f"\n{TAGS_A_RECORD} tags a record of {NUM_TAGS:,} (Zipf); half have a caption of 40 words\n")
    print(
        "| records | step | wall, s | cpu, s | private memory of all processes, MiB | bytes a record over the start |"
    )
    print("|---|---|---|---|---|---|")
    for size in map(int, options.sizes.split(",")):
        with tempfile.TemporaryDirectory(prefix="subset_manifest_") as folder:
            make_catalog(Path(folder), size)
            measure(Path(folder), size, options.repeats)


def measure(folder: Path, size: int, repeats: int) -> None:
    costs: dict[str, list[Cost]] = {step: [] for step in STEPS}
    for _ in range(repeats):
        for path in (folder / "out").glob("*"):
            path.unlink()
        (folder / "out" / ".subset.json").unlink(missing_ok=True)
        for step, code in STEPS.items():
            costs[step].append(cost_of([sys.executable, "-c", START + code, str(folder)]))
    middle = {
        step: {name: statistics.median(getattr(cost, name) for cost in of_step) for name in Cost.__slots__}
        for step, of_step in costs.items()
    }
    start = middle["start, record numbers"]["private_mib"]
    for step, cost in middle.items():
        extra = (cost["private_mib"] - start) * 2**20 / size
        print(
            f"| {size} | {step} | {cost['wall_s']:.2f} | {cost['cpu_s']:.2f} | {cost['private_mib']:.0f} "
            f"| {extra:.0f} |",
            flush=True,
        )


def make_catalog(folder: Path, size: int) -> None:
    rng = np.random.default_rng(0)
    names = pa.array([f"tag_number_{number}_of_(many)" for number in range(NUM_TAGS)])
    sentence = " ".join(["A", "knight", "with", "pink", "hair", "stands", "in", "a", "field,"] * 5)
    parts = []
    for index, start in enumerate(range(0, size, PART_ROWS)):
        count = min(PART_ROWS, size - start)
        numbers = np.arange(start, start + count)
        keys = pa.array(numbers).cast(pa.string())
        ids = np.minimum(rng.zipf(1.2, count * TAGS_A_RECORD) - 1, NUM_TAGS - 1)
        offsets = pa.array(np.arange(count + 1, dtype=np.int32) * TAGS_A_RECORD)
        path = folder / "catalog" / "parts" / digest_of("part", index)[:32]
        with PartWriter(path) as writer:
            columns = {
                "key": keys,
                "image": pc.binary_join_element_wise(keys, "webp", "."),
                "tar": pa.array([f"{start // 10_000:04d}.tar"]).take(pa.array(np.zeros(count, np.int64))),
                "offset": pa.array(numbers % 10_000 * 300_000 + 512),
                "num_bytes": pa.array(rng.integers(100_000, 299_000, count)),
                "width": pa.array(rng.choice([832, 1024, 1216], count)),
                "height": pa.array(rng.choice([832, 1024, 1216], count)),
                "rating": pa.array(rng.integers(1, 5, count)),
                "caption": pa.array([sentence, None]).take(pa.array(numbers % 2)),
            }
            writer.add(columns, [TagColumn(4, pa.ListArray.from_arrays(offsets, names.take(pa.array(ids))))])
        write_rejected(path.with_name(f"{path.name}.rejected.jsonl"), [])
        parts.append(
            CatalogPartRef(
                index=index,
                source=0,
                digest=digest_of("part", index),
                path=path,
                num_seen=count,
                num_kept=count,
                num_rejected=0,
            )
        )
    source = CatalogSource(path=folder / "tars", kind="tars")
    join_catalog(CatalogConfig(sources=(source,), out=folder / "catalog"), parts)


if __name__ == "__main__":
    main()
