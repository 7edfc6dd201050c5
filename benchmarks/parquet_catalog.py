"""A booru dump in parquet: into a catalog and a metadata JSON, against the loops people write for it.

    python benchmarks/parquet_catalog.py [--sizes 62500,250000,1000000] [--repeats 3] [--pandas-python PYTHON]

Contenders run in turn, each as a whole command (interpreter start and imports included) on a warm page cache. The
rivals: the dump with pandas, a function a row through tqdm's `thread_map` (only with --pandas-python, an interpreter
that has pandas and tqdm), and the same loop over pyarrow's `to_pylist` one row group at a time. Both make
`meta_cap_dd.json` with the tags in the order artist, character, copyright, general, meta. Ours makes the catalog:
without the index, which the rivals do not make either; so in one process; with the index; and with the same JSON of
it. The JSONs are compared.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import shutil
import statistics
import sys
import tempfile
from pathlib import Path

import pyarrow.parquet as pq
from booru_parquet import write_dump
from measure import Cost, cost_of, machine

LOOP = """
import json, sys
ORDER = ("artist", "character", "copyright", "general", "meta")
def one(row):
    tags = [tag for name in ORDER for tag in (row["tag_string_" + name] or "").split(" ") if tag]
    return str(row["id"]), {"tags": ", ".join(tags)}
"""
PANDAS = (
    LOOP
    + """
import pandas
from tqdm.contrib.concurrent import thread_map
frame = pandas.read_parquet(sys.argv[1])
columns = ["id", *("tag_string_" + name for name in ORDER)]
rows = thread_map(lambda values: one(dict(zip(columns, values))), frame[columns].itertuples(index=False, name=None),
                  max_workers=8, total=len(frame), disable=True)
with open(sys.argv[2], "w") as file:
    file.write(json.dumps(dict(rows), indent=2))
"""
)
ARROW = (
    LOOP
    + """
import pyarrow.parquet
file = pyarrow.parquet.ParquetFile(sys.argv[1])
metadata = {}
columns = ["id", *("tag_string_" + name for name in ORDER)]
for number in range(file.num_row_groups):
    metadata.update(map(one, file.read_row_group(number, columns=columns).to_pylist()))
with open(sys.argv[2], "w") as out:
    out.write(json.dumps(metadata, indent=2))
"""
)
OURS = """
import sys
from sdxl_core.cli import main
main(["catalog", "--sources", sys.argv[1], "--out", sys.argv[2] + ".catalog", *sys.argv[3:]])
"""
OURS_JSON = (
    OURS
    + """
main(["merge-tags", "--source", sys.argv[2] + ".catalog", "--out", sys.argv[2]])
"""
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--sizes", default="62500,250000,1000000")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--pandas-python", default="")
    parser.add_argument("--row-group", type=int, default=1 << 20, help="rows; 1048576 is what pandas writes")
    options = parser.parse_args()
    print(f"{machine()}; row groups of {options.row_group} rows; load before: {os.getloadavg()[0]:.1f}\n")
    print("| rows | what | wall, s | rows/s | rival / it, wall | cpu, s | rival / it, cpu | RSS, MiB | private, MiB |")
    print("|---|---|---|---|---|---|---|---|---|")
    for size in map(int, options.sizes.split(",")):
        with tempfile.TemporaryDirectory(prefix="parquet_catalog_") as folder:
            compare(Path(folder), size, options)
    print(f"\nload after: {os.getloadavg()[0]:.1f}")


def compare(folder: Path, num_rows: int, options: argparse.Namespace) -> None:
    """One table row for each contender. RSS and private memory: the highest sum over a command's processes."""
    dump = folder / "dump.parquet"
    write_dump(folder / "small_groups.parquet", num_rows)
    regroup(folder / "small_groups.parquet", dump, options.row_group)
    contenders = {
        "pyarrow `to_pylist` loop": [sys.executable, "-c", ARROW],
        "ours: catalog": [sys.executable, "-c", OURS],
        "ours: catalog, one process": [sys.executable, "-c", OURS],
        "ours: catalog and index": [sys.executable, "-c", OURS],
        "ours: catalog and JSON": [sys.executable, "-c", OURS_JSON],
    }
    options_of = {
        "ours: catalog": ["--no-index"],
        "ours: catalog, one process": ["--no-index", "--processes", "1"],
        "ours: catalog and JSON": ["--no-index"],
    }
    if options.pandas_python:
        contenders = {"pandas and `thread_map`": [options.pandas_python, "-c", PANDAS], **contenders}
    costs: dict[str, list[Cost]] = {name: [] for name in contenders}
    digests = set()
    for _ in range(options.repeats):
        for name, command in contenders.items():
            out = folder / "out" / "meta_cap_dd.json"
            shutil.rmtree(out.parent, ignore_errors=True)
            out.parent.mkdir()
            os.sync()
            arguments = [str(dump), str(out), *options_of.get(name, [])]
            costs[name].append(cost_of([*command, *arguments], log=folder / "log"))
            if out.exists():
                with open(out, "rb") as file:
                    digests.add(hashlib.file_digest(file, "sha256").hexdigest())
    assert len(digests) == 1, "the JSONs differ"
    rival = costs[next(iter(contenders))]
    for name, runs in costs.items():
        wall, cpu = (statistics.median(getattr(run, unit) for run in runs) for unit in ("wall_s", "cpu_s"))
        walls = [theirs.wall_s / own.wall_s for theirs, own in zip(rival, runs, strict=True)]
        cpus = [theirs.cpu_s / own.cpu_s for theirs, own in zip(rival, runs, strict=True)]
        print(
            f"| {num_rows} | {name} | {wall:.2f} | {num_rows / wall:,.0f} | {statistics.median(walls):.1f} "
            f"({min(walls):.1f}–{max(walls):.1f}) | {cpu:.2f} | {statistics.median(cpus):.1f} | "
            f"{max(run.rss_mib for run in runs):.0f} | {max(run.private_mib for run in runs):.0f} |",
            flush=True,
        )


def regroup(source: Path, out: Path, rows: int) -> None:
    """The same table in larger row groups."""
    table = pq.read_table(source)
    pq.write_table(table, out, row_group_size=rows, compression="zstd")
    source.unlink()


if __name__ == "__main__":
    main()
