"""What queries of a catalog cost within one process, by a scan and through the index; the two answers are compared.

python benchmarks/query_times.py CATALOG …     (each with its index, as `sdxl-flows catalog` makes them)
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import tempfile
import time
from pathlib import Path

from measure import cost_of, machine
from query import FULL, PLAIN

from sdxl_core.catalog.records import Catalog
from sdxl_core.query.grammar import parse
from sdxl_core.query.index import open_index
from sdxl_core.query.select import select_by_scan

QUERIES = (PLAIN, "1girl pink_hair -comic ( cat_ears or fox_ears )", FULL)
SCANS, RUNS = 3, 21


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("catalogs", type=Path, nargs="+")
    options = parser.parse_args()
    print(f"{machine()}; load before: {os.getloadavg()[0]:.1f}\n")
    print("The last line of each: memory of the process that ran all of these queries, private and RSS.\n")
    print(
        "| rows | query | pictures | scan, ms | scan, cpu s a million | index, ms | first, ms | index, ms a million |"
    )
    print("|---|---|---|---|---|---|---|---|")
    for path in options.catalogs:
        with tempfile.NamedTemporaryFile(suffix=".log") as log:
            cost = cost_of([sys.executable, __file__, "one", str(path)], log=Path(log.name))
            print(Path(log.name).read_text(), end="")
        rows, memory = Catalog.open(path).num_records, f"{cost.private_mib:.0f}, {cost.rss_mib:.0f} MiB"
        print(f"| {rows:,} | memory | | | | | | {memory} |", flush=True)


def told(catalog: Catalog, text: str) -> None:
    """One row of the table: medians of cpu time."""
    query, index = parse(text), open_index(catalog)
    assert index is not None, "make the catalog with its index"
    scans, runs = [], []
    for _ in range(SCANS):
        start = time.process_time()
        scanned = select_by_scan(catalog, query).records
        scans.append(time.process_time() - start)
    for _ in range(RUNS):
        start = time.process_time()
        found = index.select(query).records
        runs.append(time.process_time() - start)
    assert found.tolist() == scanned.tolist()
    scan, run, millions = statistics.median(scans), statistics.median(runs[1:]), catalog.num_records / 1e6
    print(
        f"| {catalog.num_records:,} | `{text}` | {len(found):,} | {scan * 1e3:,.0f} | {scan / millions:.2f} | "
        f"{run * 1e3:.2f} | {runs[0] * 1e3:.1f} | {run * 1e3 / millions:.2f} |",
        flush=True,
    )


if __name__ == "__main__":
    if sys.argv[1:2] == ["one"]:
        for text in QUERIES:
            told(Catalog.open(Path(sys.argv[2])), text)
    else:
        main()
