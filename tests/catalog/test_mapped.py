"""Mapped parts: as many as there are, given back when a pass has gone on, shared by forked workers without copies."""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from support.rows import catalog_of

from sdxl_core.catalog.records import Catalog
from sdxl_core.query.grammar import parse
from sdxl_core.query.index import build_index

NUM_ROWS = 6_000
CAPTION = "a girl with a long name stands at the sea " * 70  # 3 kB: some 18 MB in all


@pytest.fixture(scope="module", autouse=True)
def no_wait_for_the_disk() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", lambda handle: None)
        yield


@pytest.fixture(scope="module")
def catalog(tmp_path_factory: pytest.TempPathFactory) -> Catalog:
    rows = [
        {"key": str(n), "image": f"{n}.png", "caption": f"{n} {CAPTION}", "tags": {"general": [f"t{n % 7}", "x"]}}
        for n in range(NUM_ROWS)
    ]
    return catalog_of(tmp_path_factory.mktemp("mapped"), [rows], part_rows=1_500)


def mapped_kib(catalog: Catalog) -> int:
    """Resident pages of the catalog's parts in this process."""
    total, ours = 0, False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        words = line.split()
        if "-" in words[0] and not words[0].endswith(":"):
            ours = line.endswith(".rows.arrow") and str(catalog.path) in line
        elif ours and words[0] == "Rss:":
            total += int(words[1])
    return total


def test_a_pass_gives_back_the_pages_behind_it_and_what_it_returned_stays_right(catalog: Catalog) -> None:
    chunks = list(Catalog.open(catalog.path).chunks(["key", "caption"]))
    assert sum(chunk.table.num_rows for chunk in chunks) == NUM_ROWS
    for chunk in chunks:  # read when their pages are given back already
        assert chunk.table["caption"].to_pylist()[0] == f"{chunk.start} {CAPTION}"
    opened = Catalog.open(catalog.path)
    before, most = mapped_kib(catalog), 0
    for chunk in opened.chunks(["caption"]):
        assert chunk.table["caption"].to_numpy(zero_copy_only=False).nbytes
        most = max(most, mapped_kib(catalog) - before)
    assert 3_000 < most < 8_000  # one part of four is about 4,400
    assert mapped_kib(catalog) - before < 1_000


LOADER = """
import json, os, sys
from pathlib import Path
import numpy as np
from torch.utils.data import DataLoader, Dataset
from sdxl_core.catalog.records import Catalog

class Rows(Dataset):  # what a training set does with a catalog, and what it costs the worker's memory
    def __len__(self):
        return num_rows
    def __getitem__(self, place):
        row = opened.take(np.asarray([place]), ["key", "caption", "tags"]).to_pylist()[0]
        assert row["caption"] == f"{place} {caption}" and len(row["tags"]) == 2
        lines = Path("/proc/self/status").read_text().splitlines()
        private_kib = next(int(line.split()[1]) for line in lines if line.startswith("RssAnon"))
        return os.getpid(), private_kib, row["key"]

num_rows, caption = int(sys.argv[2]), sys.argv[3]
opened = Catalog.open(Path(sys.argv[1]))
opened.take(np.arange(num_rows), ["key", "caption", "tags"])  # mapped and touched before the forks
loader = DataLoader(Rows(), batch_size=None, shuffle=False, num_workers=2, multiprocessing_context="fork")
print(json.dumps({"parent": os.getpid(), "rows": list(loader)}))
"""


def test_forked_loader_workers_read_safely_and_copy_nothing(catalog: Catalog) -> None:
    """In a process of its own, as a trainer is: a forked child of one that ran a flow ends with Prefect's error."""
    command = [sys.executable, "-c", LOADER, str(catalog.path), str(NUM_ROWS), CAPTION]
    run = subprocess.run(command, capture_output=True, text=True, check=False)
    assert not run.returncode, run.stderr
    found = json.loads(run.stdout)
    assert [key for _, _, key in found["rows"]] == [str(n) for n in range(NUM_ROWS)]
    memory: dict[int, list[int]] = {}
    for worker, private, _ in found["rows"]:
        memory.setdefault(worker, []).append(private)
    assert len(memory) == 2 and found["parent"] not in memory
    for sizes in memory.values():  # each read half of 18 MB
        assert max(sizes[100:]) - sizes[100] < 2_048


FEW_HANDLES = """
import resource, sys
from pathlib import Path
from sdxl_core.catalog.records import Catalog
from sdxl_core.query.grammar import parse
from sdxl_core.query.index import build_index
from sdxl_core.query.select import select_by_scan
resource.setrlimit(resource.RLIMIT_NOFILE, (80, 80))
catalog = Catalog.open(Path(sys.argv[1]))
assert sum(chunk.table.num_rows for chunk in catalog.chunks(["key", "tags"])) == 400
assert build_index(catalog).select(parse("t1")).num_matched == select_by_scan(catalog, parse("t1")).num_matched == 40
"""


def test_parts_may_be_more_than_files_that_may_be_open(tmp_path: Path) -> None:
    rows = [{"key": str(n), "image": "x.png", "tags": {"": [f"t{n % 10}"]}} for n in range(400)]
    made = catalog_of(tmp_path, [rows], part_rows=2)
    run = subprocess.run([sys.executable, "-c", FEW_HANDLES, made.path], capture_output=True, text=True, check=False)
    assert not run.returncode, run.stderr


def test_ranges_and_chunks_do_not_change_an_index(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = [
        {"key": str(n), "image": "x.png", "score": n, "tags": {"": ["all", f"t{n % 50}", f"u{n % 3}", f"own{n}"]}}
        for n in range(250)
    ]
    files = []
    for number, (range_entries, chunk_records, part_rows) in enumerate(
        [(1 << 22, 65_536, 1_000), (7, 100, 64), (1, 130, 250), (100, 13, 60)]
    ):
        monkeypatch.setattr("sdxl_core.query.indexing.RANGE", range_entries)
        monkeypatch.setattr("sdxl_core.catalog.records.CHUNK_RECORDS", chunk_records)
        made = catalog_of(tmp_path / str(number), [rows], part_rows=part_rows)
        index = build_index(made)
        assert index.select(parse("t3 u0 -own3")).records.tolist() == [n for n in range(53, 250, 50) if n % 3 == 0]
        content = {file.name: file.read_bytes() for file in (made.path / "index").rglob("*.npy")}
        files.append(content)
    assert files[0] == files[1] == files[2] == files[3]
