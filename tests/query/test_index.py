"""The index on disk: made once, whole or not at all, of exactly one state of the catalog."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from support.rows import catalog_of

from sdxl_core.catalog.records import Catalog
from sdxl_core.query.grammar import parse
from sdxl_core.query.index import build_index, open_index


def some_catalog(folder: Path, *, offset: int = 0, size: int = 500) -> Catalog:
    rows = [
        {"key": str(n + offset), "tags": {"": [f"t{n % 9}", f"u{n}"]}, "image": "x.png", "score": n}
        for n in range(size)
    ]
    return catalog_of(folder, [rows], part_rows=64)


def test_an_index_is_made_once(tmp_path: Path) -> None:
    catalog = some_catalog(tmp_path)
    assert open_index(catalog) is None
    build_index(catalog)
    times = {file: file.stat().st_mtime_ns for file in (catalog.path / "index").rglob("*")}
    assert build_index(catalog).select(parse("t3 u3")).records.tolist() == [3]
    assert {file: file.stat().st_mtime_ns for file in (catalog.path / "index").rglob("*")} == times


def test_a_changed_catalog_has_no_index_until_it_is_made_again(tmp_path: Path) -> None:
    build_index(some_catalog(tmp_path))
    changed = some_catalog(tmp_path, offset=7)
    assert open_index(changed) is None
    assert build_index(changed).select(parse("u3")).records.tolist() == [3]
    assert len(list((changed.path / "index").iterdir())) == 1, "the index of the earlier state is gone"


@pytest.mark.parametrize("name", ["postings.npy", "names.arrow", "known_score.npy"])
def test_an_index_with_a_missing_or_short_file_is_made_again(tmp_path: Path, name: str) -> None:
    catalog = some_catalog(tmp_path)
    build_index(catalog)
    file = next((catalog.path / "index").rglob(name))
    os.truncate(file, file.stat().st_size - 1)
    assert open_index(catalog) is None
    assert build_index(catalog).select(parse("t3 score:<20")).records.tolist() == [3, 12]


KILLED = """
import sys
from pathlib import Path
from sdxl_core.catalog.records import Catalog
from sdxl_core.query.index import build_index
build_index(Catalog.open(Path(sys.argv[1])))
"""


def test_a_killed_build_leaves_no_half_index(tmp_path: Path) -> None:
    catalog = some_catalog(tmp_path, size=30_000)
    expected = build_index(catalog).select(parse("t3 -u3 score:<999")).records
    for delay in np.linspace(0.0, 0.35, 8):
        next((catalog.path / "index").rglob("index.json")).unlink()
        process = subprocess.Popen([sys.executable, "-c", KILLED, str(catalog.path)])
        while not list((catalog.path / "index").rglob("*.npy")) and process.poll() is None:
            time.sleep(0.002)
        time.sleep(float(delay))
        process.send_signal(signal.SIGKILL)
        process.wait()
        index = build_index(catalog)
        assert index.select(parse("t3 -u3 score:<999")).records.tolist() == expected.tolist()
