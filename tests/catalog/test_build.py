"""Building a catalog: neither the number of processes nor a kill in the middle changes what it says."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
from support.dumps import danbooru_tables, write_dump
from support.tars import write_tar

from sdxl_core.catalog.build import build_catalog
from sdxl_core.catalog.config import CatalogConfig, CatalogSource
from sdxl_core.catalog.images import read_image_bytes
from sdxl_core.catalog.records import Catalog
from sdxl_core.catalog.schema import ROWS
from sdxl_core.catalog.sources import jsonl as jsonl_source
from sdxl_core.catalog.sources import parquet
from sdxl_core.errors import ConfigError, DataError

NUM_ROWS = 1_200
BUILD = """
import sys
from pathlib import Path
from sdxl_core.catalog.build import build_catalog
from sdxl_core.catalog.config import CatalogConfig
from sdxl_core.catalog.sources import jsonl, parquet
parquet.PART_ROWS, parquet.BATCH, jsonl.PIECE_BYTES = 100, 40, 4_000
config = CatalogConfig.model_validate_json(Path(sys.argv[1]).read_bytes())
build_catalog(config, progress=lambda *told: print(*told, flush=True))
"""


def collection(folder: Path) -> tuple[CatalogSource, ...]:
    """Some of every kind of source, that speak of the same pictures."""
    folder.mkdir(parents=True)
    write_dump(folder / "meta.parquet", NUM_ROWS, row_group_size=450)
    rng = random.Random(0)
    ids = [row["id"] for table in danbooru_tables(NUM_ROWS) for row in table.select(["id"]).to_pylist()]
    (folder / "captions.jsonl").write_text(
        "".join(json.dumps({"id": number, "caption": f"picture {number}"}) + "\n" for number in rng.sample(ids, 700))
    )
    (folder / "old.json").write_text(
        json.dumps({f"{number}.webp": {"tags": f"t{number}, old"} for number in ids[:300]}, indent=2)
    )
    for shard in range(4):
        mine = [number for number in ids if number % 4 == shard and number % 3]
        write_tar(folder / "pix" / f"{shard}.tar", {f"{number}.webp": b"p%d" % number for number in mine})
    (folder / "more").mkdir()
    for number in range(20):
        (folder / "more" / f"extra{number}.png").write_bytes(b"x")
        (folder / "more" / f"extra{number}.txt").write_text(f"1girl, t{number}")
    return tuple(
        CatalogSource(path=folder / name) for name in ("pix", "more", "meta.parquet", "captions.jsonl", "old.json")
    )


def content(out: Path) -> dict[str, Any]:
    """Everything that a catalog says, tags by name, and every file of it but the results of parts."""
    catalog = Catalog.open(out)
    tags = catalog.vocabulary["tag"].to_pylist()
    names = [name for name in ROWS.names if name != "key_hash"]
    rows = [row for chunk in catalog.chunks([*names, "source"]) for row in chunk.table.to_pylist()]
    for row in rows:
        row["tags"] = row["tags"] and [tags[tag] for tag in row["tags"]]
    return {
        "rows": rows,
        "vocabulary": catalog.vocabulary.to_pylist(),
        "rejected": (out / "rejected.jsonl").read_bytes(),
    }


def files(out: Path) -> dict[str, bytes]:
    found = [path for path in out.rglob("*") if path.is_file() and not path.name.endswith((".result.json", ".lock"))]
    return {path.relative_to(out).as_posix(): path.read_bytes() for path in found}


def test_parts_and_processes_do_not_change_what_it_says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sources = collection(tmp_path / "in")
    build_catalog(CatalogConfig(sources=sources, out=tmp_path / "whole", processes=1))
    expected = content(tmp_path / "whole")
    assert len(expected["rows"]) == NUM_ROWS + 20
    monkeypatch.setattr(parquet, "PART_ROWS", 100)
    monkeypatch.setattr(parquet, "BATCH", 40)
    monkeypatch.setattr(jsonl_source, "PIECE_BYTES", 4_000)
    for processes in (1, 2, 3):
        out = tmp_path / f"p{processes}"
        build_catalog(CatalogConfig(sources=sources, out=out, processes=processes))
        found = content(out)
        assert found["rows"] == expected["rows"] and found["rejected"] == expected["rejected"]
        by_tag = [sorted(map(str, content["vocabulary"])) for content in (found, expected)]
        assert by_tag[0] == by_tag[1]
    assert files(tmp_path / "p1") == files(tmp_path / "p2") == files(tmp_path / "p3")


@pytest.mark.parametrize("seed", range(4))
def test_a_build_killed_anywhere_and_run_again_is_as_if_undisturbed(tmp_path: Path, seed: int) -> None:
    sources = collection(tmp_path / "in")
    rng = random.Random(seed)
    kills = []
    for name in ("undisturbed", "killed"):
        config = CatalogConfig(sources=sources, out=tmp_path / name, processes=2)
        (tmp_path / f"{name}.json").write_text(config.model_dump_json())
    run([tmp_path / "undisturbed.json"])
    for _ in range(3):
        kills.append(run([tmp_path / "killed.json"], kill_after=rng.randrange(1, 12), wait_s=rng.random() * 0.02))
        if kills[-1] and (tmp_path / "killed" / "catalog.json").exists():
            content(tmp_path / "killed")  # whatever has its name is whole
    assert any(kills), "every run ended before it was killed"
    run([tmp_path / "killed.json"])
    assert content(tmp_path / "killed") == content(tmp_path / "undisturbed")
    assert files(tmp_path / "killed") == files(tmp_path / "undisturbed")


def run(arguments: list[Path], *, kill_after: int | None = None, wait_s: float = 0) -> bool:
    """Build in a process of its own; kill it and its children so many lines of progress later. Whether it was."""
    process = subprocess.Popen(
        [sys.executable, "-c", BUILD, *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        start_new_session=True,
    )
    assert process.stdout is not None and process.stderr is not None
    if kill_after is not None:
        for _ in range(kill_after):
            process.stdout.readline()
        time.sleep(wait_s)
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
    _, errors = process.communicate()
    if process.returncode != -signal.SIGKILL:
        assert process.returncode == 0, errors.decode()
    return process.returncode == -signal.SIGKILL


def test_what_is_read_already_is_not_read_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sources = collection(tmp_path / "in")
    out = tmp_path / "c"
    first = build_catalog(CatalogConfig(sources=sources[:3], out=out, processes=1))
    monkeypatch.setattr(pq.ParquetFile, "iter_batches", None)  # whoever reads a row of the dump now, fails
    again = build_catalog(CatalogConfig(sources=sources[:3], out=out, processes=1))
    assert again == first
    more = build_catalog(CatalogConfig(sources=sources, out=out, processes=1))
    assert more.num_seen == first.num_seen + 1_000


def test_forked_readers_share_one_catalog(tmp_path: Path) -> None:
    build_catalog(CatalogConfig(sources=collection(tmp_path / "in"), out=tmp_path / "c", processes=1))
    catalog = Catalog.open(tmp_path / "c")
    columns = ["key", "tags", "caption", "rating", "image"]
    order = np.random.default_rng(0).permutation(catalog.num_records)
    expected = catalog.take(order, columns)  # mapped, and every page touched, before the forks
    tarred = np.flatnonzero(np.asarray(catalog.take(np.arange(catalog.num_records), ["tar"])["tar"].is_valid()))
    pictures = list(read_image_bytes(catalog, tarred))
    children = []
    for number in range(4):
        child = os.fork()
        if not child:
            status = 1
            try:
                for _ in range(5):
                    mine = np.random.default_rng(number).permutation(len(order))
                    same = catalog.take(order[mine], columns).to_pylist() == [
                        expected.slice(n, 1).to_pylist()[0] for n in mine
                    ]
                    bytes_same = list(read_image_bytes(catalog, tarred[::-1])) == pictures[::-1]
                    if not (same and bytes_same):
                        os._exit(2)
                status = 0
            finally:
                os._exit(status)
        children.append(child)
    assert [os.waitpid(child, 0)[1] for child in children] == [0] * 4
    assert catalog.take(order, columns).equals(expected)


def test_a_source_that_cannot_be_read_leaves_the_catalog_as_it_was(tmp_path: Path) -> None:
    sources = collection(tmp_path / "in")
    out = tmp_path / "c"
    build_catalog(CatalogConfig(sources=sources, out=out, processes=1))
    before = content(out)
    (tmp_path / "in" / "bad.parquet").write_bytes(b"PAR1 and nothing more")
    with pytest.raises(DataError, match=r"bad\.parquet: not a parquet file"):
        build_catalog(
            CatalogConfig(sources=(*sources, CatalogSource(path=tmp_path / "in" / "bad.parquet")), out=out, processes=1)
        )
    assert content(out) == before


@pytest.mark.parametrize(
    ("source", "said"),
    [
        ({"path": "nothere"}, r"nothere: does not exist\. Name a folder of pictures, of tars or of parquet"),
        ({"path": "nothere.parquet"}, r"nothere\.parquet: does not exist"),
        ({"path": "cat.toml"}, r"cat\.toml: a file of no known kind.*--config"),
        ({"path": "pix", "ratings": ("g",)}, r"pix: `ratings` is set.*Put `ratings` at the parquet"),
        ({"path": "empty"}, "no pictures in it"),
    ],
)
def test_sources_are_looked_at_before_anything_is_written(tmp_path: Path, source: dict[str, Any], said: str) -> None:
    (tmp_path / "cat.toml").touch()
    for folder in ("pix", "empty"):
        (tmp_path / folder).mkdir()
    (tmp_path / "pix" / "1.png").write_bytes(b"x")
    bad = CatalogSource(**{**source, "path": tmp_path / source["path"]})
    before = sorted(tmp_path.rglob("*"))
    others = () if source["path"] in ("pix", "empty") else (CatalogSource(path=tmp_path / "pix"),)
    with pytest.raises(ConfigError if source["path"] != "empty" else DataError, match=said):
        build_catalog(CatalogConfig(sources=(*others, bad), out=tmp_path / "c"))
    assert sorted(tmp_path.rglob("*")) == before
