"""12.4 million rows on this machine: parquet -> catalog -> index -> query -> subset manifest -> meta_cap_dd.json.

    python benchmarks/booru_scale.py WORK [--rows 12400000]

Every step is a command of its own, so wall time includes interpreter start and imports. WORK needs 25 GB at 12.4
million rows; what it holds already (the dump) is used again.
"""

from __future__ import annotations

import argparse
import shutil
import statistics
import sys
import time
from pathlib import Path

from booru_parquet import write_dump
from measure import Cost, cost_of, machine

COMMAND = [sys.executable, "-m", "sdxl_core.cli"]
QUERIES = (
    "1girl pink_hair",
    "1girl pink_hair -comic ( cat_ears or fox_ears )",
    "astolfo_(fate) -comic rating:g,s score:>=10 width:>=768 ( pink_hair or blonde_hair ) *_ears",
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("work", type=Path)
    parser.add_argument("--rows", type=int, default=12_400_000)
    options = parser.parse_args()
    options.work.mkdir(parents=True, exist_ok=True)
    dump = options.work / f"dump-{options.rows}.parquet"
    if not dump.exists():
        write_dump(dump.with_suffix(".partial"), options.rows)
        dump.with_suffix(".partial").rename(dump)
    print(f"{machine()}; load before: {Path('/proc/loadavg').read_text().split()[0]}\n")
    print("| step | wall, s | cpu, s | private, MiB | with mapped pages, MiB | on disk, MB |")
    print("|---|---|---|---|---|---|")
    print(f"| the dump: {options.rows:,} rows of parquet | | | | | {dump.stat().st_size / 1e6:,.0f} |")
    steps(dump, options.work)
    times(options.work / "catalog")


def steps(dump: Path, work: Path) -> None:
    catalog, picked, merged, part = (work / name for name in ("catalog", "picked", "merged", "merged_part"))
    for folder in (catalog, picked, merged, part):
        shutil.rmtree(folder, ignore_errors=True)
    build = ["catalog", "--sources", str(dump), "--out", str(catalog)]
    told("catalog", cost_of([*COMMAND, *build, "--no-index"]), catalog)
    told("index", cost_of([*COMMAND, *build]), catalog / "index")
    told("all of it again: nothing to do", cost_of([*COMMAND, *build]), None)
    subset = ["subset", "--source", str(catalog), "--query", QUERIES[1], "--how", "manifest", "--out", str(picked)]
    told(f"`{QUERIES[1]}` as a manifest", cost_of([*COMMAND, *subset]), picked)
    merge = ["merge-tags", "--source", str(catalog), "--out"]
    manifest = ["--manifest", str(picked / "manifest.arrow")]
    for step, out, options in (
        ("the manifest's meta_cap_dd.json", part, manifest),
        ("meta_cap_dd.json of all", merged, []),
    ):
        told(step, cost_of([*COMMAND, *merge, str(out / "m.json"), *options]), out / "m.json")


def told(step: str, cost: Cost, made: Path | None) -> None:
    files = [] if made is None else [made] if made.is_file() else [path for path in made.rglob("*") if path.is_file()]
    size = f"{sum(path.stat().st_size for path in files) / 1e6:,.0f}" if made is not None else ""
    numbers = f"{cost.wall_s:.1f} | {cost.cpu_s:.1f} | {cost.private_mib:.0f} | {cost.rss_mib:.0f}"
    print(f"| {step} | {numbers} | {size} |", flush=True)


def times(path: Path) -> None:
    """Queries within one process, without and with the index."""
    from sdxl_core.catalog.records import Catalog
    from sdxl_core.query.grammar import parse
    from sdxl_core.query.index import open_index
    from sdxl_core.query.select import select_by_scan

    catalog = Catalog.open(path)
    index = open_index(catalog)
    assert index is not None
    print("\n| query | pictures | scan, cpu s | a million rows | index, ms (median of 9) | a million rows |")
    print("|---|---|---|---|---|---|")
    for text in QUERIES:
        query = parse(text)
        started = time.process_time()
        scanned = select_by_scan(catalog, query).records
        scan = time.process_time() - started
        walls = []
        for _ in range(9):
            started = time.perf_counter()
            found = index.select(query).records
            walls.append(1_000 * (time.perf_counter() - started))
        assert (found == scanned).all() and len(found) == len(scanned)
        millions, wall = catalog.num_records / 1e6, statistics.median(walls)
        times = f"{scan:.2f} | {scan / millions:.2f} | {wall:.1f} | {wall / millions:.1f}"
        print(f"| `{text}` | {len(found):,} | {times} |")


if __name__ == "__main__":
    main()
