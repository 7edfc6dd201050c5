"""Tag queries: substring matches over the dump's tag strings, the scan of a catalog, and its index.

python benchmarks/query.py WORK --rows 62500 250000 1000000 --repeats 3     (WORK: a folder; dumps and catalogs stay)
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from booru_parquet import write_dump
from measure import cost_of, machine

PLAIN = "long_hair -comic"
FULL = "astolfo_(fate) -comic rating:g,s score:>=10 width:>=768 ( pink_hair or blonde_hair ) *_ears"
IN_MEMORY = 21  # a query that takes milliseconds is run so often; the first, on cold caches, is told apart


def seconds(work: Callable[[], Any]) -> tuple[float, Any]:
    start = time.process_time()
    result = work()
    return time.process_time() - start, result


def tag_texts(dump: Path) -> Any:
    """One text of all tags a row, between blanks, in memory."""
    import pyarrow.compute as pc
    import pyarrow.parquet as pq

    table = pq.read_table(dump, columns=[f"tag_string_{name}" for name in ("artist", "character", "general", "meta")])
    return pc.binary_join_element_wise("", *table.columns, "", " ")


def python_in(texts: list[str]) -> int:
    """A substring match, row by row."""
    return sum("long_hair" in text and "comic" not in text for text in texts)


def python_exact(texts: list[str]) -> int:
    """The right answer, row by row."""
    return sum(" long_hair " in text and " comic " not in text for text in texts)


def arrow_contains(texts: Any) -> int:
    """What pandas' str.contains does with Arrow strings."""
    import pyarrow.compute as pc

    wanted = pc.match_substring(texts, "long_hair")
    return int(pc.sum(pc.and_not(wanted, pc.match_substring(texts, "comic"))).as_py())


def rival(name: str, dump: Path) -> dict[str, float]:
    texts = tag_texts(dump)
    if name == "arrow":
        cpu_s, found = seconds(lambda: arrow_contains(texts))
    else:
        rows = texts.to_pylist()
        del texts
        cpu_s, found = seconds(lambda: (python_in if name == "python" else python_exact)(rows))
    return {"cpu_s": cpu_s, "found": found}


def ours(name: str, catalog_path: Path) -> dict[str, float]:
    from sdxl_core.catalog.records import Catalog
    from sdxl_core.query.explain import explain
    from sdxl_core.query.grammar import parse
    from sdxl_core.query.index import build_index, open_index
    from sdxl_core.query.select import select_by_scan

    catalog = Catalog.open(catalog_path)
    if name == "build":
        shutil.rmtree(catalog_path / "index", ignore_errors=True)
        cpu_s, _ = seconds(lambda: build_index(catalog))
        size = sum(file.stat().st_size for file in (catalog_path / "index").rglob("*") if file.is_file())
        return {"cpu_s": cpu_s, "found": size}
    query = parse(PLAIN if name.endswith("plain") else FULL)
    if name.startswith("scan"):
        cpu_s, selection = seconds(lambda: select_by_scan(catalog, query))
        return {"cpu_s": cpu_s, "found": len(selection.records)}
    index = open_index(catalog)
    assert index is not None
    if name.startswith("explain"):
        times = [seconds(lambda: explain(catalog, query, index))[0] for _ in range(IN_MEMORY)]
        return {
            "cpu_s": statistics.median(times[1:]),
            "first_s": times[0],
            "found": len(explain(catalog, query, index)),
        }
    runs = [seconds(lambda: index.select(query)) for _ in range(IN_MEMORY)]
    times = [run[0] for run in runs]
    return {"cpu_s": statistics.median(times[1:]), "first_s": times[0], "found": len(runs[0][1].records)}


CONTENDERS = {
    "python": f"Python `in`, `{PLAIN}`, substrings",
    "exact": f"Python `in` between blanks, `{PLAIN}`",
    "arrow": f"pyarrow match_substring, `{PLAIN}`",
    "scan plain": f"ours, no index, `{PLAIN}`",
    "scan full": "ours, no index, the long query",
    "build": "ours, making the index",
    "index plain": f"ours, index, `{PLAIN}`",
    "index full": "ours, index, the long query",
    "explain full": "ours, index, every term of the long query counted",
}


def prepare(work: Path, num_rows: int) -> tuple[Path, Path]:
    """The dump and the catalog of it, made once."""
    from sdxl_core.catalog.build import build_catalog
    from sdxl_core.catalog.config import CatalogConfig, CatalogSource

    dump, catalog = work / f"{num_rows}.parquet", work / f"{num_rows}.catalog"
    if not dump.exists():
        write_dump(dump, num_rows)
    build_catalog(CatalogConfig(sources=(CatalogSource(path=dump),), out=catalog, index=False))
    return dump, catalog


def measured(name: str, dump: Path, catalog: Path) -> dict[str, float]:
    """One contender in a process of its own."""
    command = [sys.executable, __file__, "one", name, str(dump if name in ("python", "exact", "arrow") else catalog)]
    with tempfile.NamedTemporaryFile(suffix=".log") as log:
        cost = cost_of(command, log=Path(log.name))
        result = json.loads(re.findall(r"^\{.*\}$", Path(log.name).read_text(), re.MULTILINE)[-1])
    return {**result, "wall_s": cost.wall_s, "private": cost.private_mib, "rss": cost.rss_mib}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("work", type=Path)
    parser.add_argument("--rows", type=int, nargs="+", default=[62_500, 250_000, 1_000_000])
    parser.add_argument("--repeats", type=int, default=3)
    options = parser.parse_args()
    options.work.mkdir(parents=True, exist_ok=True)
    print(f"{machine()}; load before: {os.getloadavg()[0]:.1f}\n")
    print("| rows | what | cpu, ms | cpu, ms a million rows | rival / it | answer | private, MiB | RSS, MiB |")
    print("|---|---|---|---|---|---|---|---|")
    for num_rows in options.rows:
        dump, catalog = prepare(options.work, num_rows)
        runs: dict[str, list[dict[str, float]]] = {name: [] for name in CONTENDERS}
        for _ in range(options.repeats):
            for name in CONTENDERS:
                runs[name].append(measured(name, dump, catalog))
        for name, words in CONTENDERS.items():
            middle = {key: statistics.median(run[key] for run in runs[name]) for key in runs[name][0]}
            pairs = zip(runs["arrow"], runs[name], strict=True)
            ratio = statistics.median(rival["cpu_s"] / run["cpu_s"] for rival, run in pairs)
            shown = f"{ratio:,.1f}" if name != "build" and "explain" not in name and "full" not in name else "–"
            first = f" (first {middle['first_s'] * 1e3:.1f})" if "first_s" in middle else ""
            answer = f"{middle['found'] / 2**20:,.0f} MiB" if name == "build" else f"{middle['found']:,.0f}"
            print(
                f"| {num_rows:,} | {words} | {middle['cpu_s'] * 1e3:,.1f}{first} | "
                f"{middle['cpu_s'] * 1e9 / num_rows:,.1f} | {shown} | {answer} | {middle['private']:,.0f} | "
                f"{middle['rss']:,.0f} |",
                flush=True,
            )
    print(f"\nload after: {os.getloadavg()[0]:.1f}")


if __name__ == "__main__":
    if sys.argv[1:2] == ["one"]:
        contender = rival if sys.argv[2] in ("python", "exact", "arrow") else ours
        print(json.dumps(contender(sys.argv[2], Path(sys.argv[3]))))
    else:
        main()
