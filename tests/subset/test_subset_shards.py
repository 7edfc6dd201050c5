"""Placed in shards: neither what comes out nor what is refused depends on how many there are, or on who places them."""

import os
import random
import signal
import subprocess
import sys
import time
import tracemalloc
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import orjson
import pyarrow as pa
import pyarrow.parquet
import pytest

from sdxl_core.catalog.build import build_catalog
from sdxl_core.catalog.config import CatalogConfig, CatalogSource
from sdxl_core.catalog.records import Catalog
from sdxl_core.config import SubsetConfig, SubsetHow
from sdxl_core.errors import DataError, LockedError
from sdxl_core.lock import output_lock
from sdxl_core.refs import SubsetRef, to_json
from sdxl_core.rejected import read_rejected
from sdxl_core.subset.run import join_placed, subset_records
from sdxl_core.subset.shard import place_shard, shard_is_placed
from sdxl_core.subset.stage import plan_subset, subset

HOWS: list[SubsetHow] = ["copy", "hardlink", "symlink"]


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """30 pictures of which 20 are red: one without readable bytes, one without any text."""
    for number in range(30):
        path = tmp_path / "in" / f"{number % 3}" / f"{number}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"picture %d" % number * 50)
        path.with_suffix(".txt").write_text("red, sea" if number < 20 else "blue")
    (tmp_path / "in" / "0" / "3.png").unlink()
    (tmp_path / "in" / "0" / "3.png").symlink_to("/proc/self/mem")  # its first byte cannot be read
    (tmp_path / "in" / "1" / "4.txt").unlink()
    return tmp_path / "in"


def config_of(source: Path, out: str = "out", **options: Any) -> SubsetConfig:
    return SubsetConfig(source=source, query="red", out=source.parent / out, **options)


def in_threads(config: SubsetConfig) -> SubsetRef:
    plan = plan_subset(config)
    with ThreadPoolExecutor(4) as pool:
        shards = list(pool.map(place_shard, plan.shards))
    return join_placed(plan, shards)


def from_the_last(config: SubsetConfig) -> SubsetRef:
    plan = plan_subset(config)
    return join_placed(plan, [place_shard(shard) for shard in plan.shards[::-1]][::-1])


def seen(out: Path) -> dict[str, tuple[bytes, int]]:
    """Files with content and time, but for what is kept of the shards and for times of our own lists."""
    found = {}
    for path in out.rglob("*"):
        name = str(path.relative_to(out))
        if path.is_file() and not name.startswith((".subset", ".lock")):
            is_list = name in ("rejected.jsonl", "missing.jsonl")
            found[name] = path.read_bytes(), 0 if is_list else path.stat().st_mtime_ns
    return found


@pytest.mark.parametrize("how", HOWS)
def test_shards_and_workers_never_change_what_comes_out(source: Path, how: SubsetHow) -> None:
    if how != "copy":  # a link to such a file would be refused, or work
        (source / "0" / "3.png").unlink()
        (source / "0" / "3.png").write_bytes(b"readable")
    ways: list[tuple[int, Callable[[SubsetConfig], SubsetRef]]] = [
        (1000, subset), (1, subset), (7, in_threads), (3, from_the_last),
    ]  # fmt: skip
    told = []
    for number, (shard_size, make) in enumerate(ways):
        ref = make(config_of(source, f"out{number}", how=how, shard_size=shard_size))
        same = {name: value for name, value in to_json(ref).items() if name not in ("path", "rejected", "catalog")}
        told.append((same, seen(source.parent / f"out{number}")))
        assert ref.num_kept + ref.num_unmatched + ref.num_rejected == ref.num_seen == 30
    assert told.count(told[0]) == len(ways)
    assert (told[0][0]["num_kept"], told[0][0]["num_rejected"]) == ((18, 2) if how == "copy" else (19, 1))


def test_other_shards_take_over_what_is_there(source: Path) -> None:
    first = subset(config_of(source, how="copy", shard_size=4))
    out = source.parent / "out"
    before = {path: path.stat().st_ino for path in out.rglob("*.png")}
    (source / "0" / "0.txt").write_text("blue")  # leaves, so that all that follow move
    (source / "2" / "29.txt").write_text("red")
    second = subset(config_of(source, how="copy", shard_size=5))
    assert second.num_kept == first.num_kept
    assert not (out / "0" / "0.png").exists() and (out / "2" / "29.png").exists()
    assert {path: path.stat().st_ino for path in out.rglob("*.png")}.items() - before.items() == {
        (out / "2" / "29.png", (out / "2" / "29.png").stat().st_ino)
    }
    stored = [orjson.loads(path.read_bytes()) for path in (out / ".subset").glob("*.ledger")]
    assert len(stored) == 4 and sum(len(ledger["files"]) for ledger in stored) == 2 * second.num_kept


@pytest.mark.parametrize("how", HOWS)
def test_a_finished_shard_answers_and_one_with_a_changed_file_does_not(source: Path, how: SubsetHow) -> None:
    for path in (source / "0" / "3.png", source / "0" / "3.txt"):  # it cannot be read
        path.unlink()
    config = config_of(source, how=how, shard_size=6)
    first = subset(config)
    plan = plan_subset(config)
    assert [shard_is_placed(shard) for shard in plan.shards] == [True] * 3
    out = source.parent / "out"
    victim = next(path for path in sorted(out.rglob("*.png")))
    victim.unlink()
    assert [shard_is_placed(shard) for shard in plan.shards].count(False) == 1
    assert subset(config) == first and victim.exists()
    victim.unlink()
    victim.write_bytes(b"mine")
    assert [shard_is_placed(shard) for shard in plan.shards].count(False) == 1
    with pytest.raises(DataError, match=r"exists with another content"):
        subset(config)
    assert victim.read_bytes() == b"mine"


def test_a_file_that_comes_between_plan_and_placing_is_not_overwritten(source: Path) -> None:
    plan = plan_subset(config_of(source, how="copy", shard_size=6))
    mine = source.parent / "out" / "0" / "0.png"
    mine.parent.mkdir()
    mine.write_bytes(b"mine")
    with pytest.raises(DataError, match=r"0\.png exists with another content"):
        place_shard(plan.shards[0])
    assert mine.read_bytes() == b"mine"


def test_a_file_in_the_way_of_the_last_shard_stops_all_before_anything_is_placed(source: Path) -> None:
    out = source.parent / "out"
    (out / "1").mkdir(parents=True)
    (out / "1" / "19.txt").write_text("precious")
    with pytest.raises(DataError, match=r"19\.txt exists with another content"):
        subset(config_of(source, how="copy", shard_size=2))
    assert [path.name for path in out.rglob("*") if path.is_file()] == ["19.txt"]


def test_a_subset_of_one_ledger_is_taken_over(source: Path) -> None:
    """As folders were kept before there were shards."""
    config = config_of(source, how="copy")
    first = subset(config)
    out = source.parent / "out"
    (path,) = (out / ".subset").glob("*.ledger")
    ledger, head = orjson.loads(path.read_bytes()), orjson.loads((out / ".subset.json").read_bytes())
    for file in (out / ".subset").iterdir():
        file.unlink()
    old = {"settings": head["settings"], "finished": True, "files": ledger["files"], "marks": ledger["marks"]}
    (out / ".subset.json").write_bytes(orjson.dumps(old))
    before = {path: path.stat().st_ino for path in out.rglob("*.png")}
    (source / "0" / "0.txt").write_text("blue")
    second = subset(config)
    assert second.num_kept == first.num_kept - 1 and not (out / "0" / "0.png").exists()
    assert {path: path.stat().st_ino for path in out.rglob("*.png")}.items() <= before.items()


def test_words_of_the_same_length_that_changed_are_written_again(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "7.png").write_bytes(b"seven")
    sources = (CatalogSource(path=tmp_path / "in", use=("images",)), CatalogSource(path=tmp_path / "posts.parquet"))
    for tag in ("sea", "sky"):
        pa.parquet.write_table(pa.table({"id": [7], "tag_string": [tag]}), tmp_path / "posts.parquet")
        build_catalog(CatalogConfig(sources=sources, out=tmp_path / "catalog", processes=1))
        subset(SubsetConfig(source=tmp_path / "catalog", query="s*", how="copy", out=tmp_path / "out"))
        assert (tmp_path / "out" / "7.txt").read_text() == tag


def test_two_runs_never_work_in_one_folder(source: Path) -> None:
    code = (
        "import sys; from pathlib import Path; from sdxl_core.lock import output_lock\n"
        "with output_lock(Path(sys.argv[1]), purpose='makes a subset'): print('go', flush=True); sys.stdin.read()"
    )
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[2])}
    argv = [sys.executable, "-c", code, str(source.parent / "out")]
    with subprocess.Popen(argv, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as other:
        assert other.stdout is not None and other.stdout.readline() == b"go\n"
        with pytest.raises(LockedError):
            plan_subset(config_of(source, how="copy"))
        with pytest.raises(LockedError):
            subset(config_of(source, how="copy"))
        other.kill()
    with output_lock(source.parent / "out", purpose="test"):
        assert subset(config_of(source, how="copy")).num_kept == 18


def test_a_run_killed_between_shards_equals_an_undisturbed_one(tmp_path: Path) -> None:
    rng = random.Random(5)
    for number in range(400):
        path = tmp_path / "in" / f"{number}.png"
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(rng.randbytes(9_000))
        path.with_suffix(".txt").write_text("red")
    config = config_of(tmp_path / "in", how="copy", shard_size=23)
    whole = subset(config_of(tmp_path / "in", "whole", how="copy"))
    code = (
        "import sys; from sdxl_core.config import SubsetConfig; from sdxl_core.subset.stage import subset\n"
        "print('go', flush=True); subset(SubsetConfig.model_validate_json(sys.argv[1]))"
    )
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[2])}
    for kill in range(3):
        argv = [sys.executable, "-c", code, config.model_dump_json()]
        with subprocess.Popen(argv, env=environment, stdout=subprocess.PIPE) as process:
            assert process.stdout is not None and process.stdout.readline() == b"go\n"
            while process.poll() is None and len(list((tmp_path / "out").glob("*.png"))) < 100 * (kill + 1):
                time.sleep(0.002)
            process.send_signal(signal.SIGKILL)
    ref = subset(config.model_copy(update={"shard_size": 31}))
    assert (ref.digest, ref.num_kept) == (whole.digest, 400)
    assert seen(tmp_path / "out") == seen(tmp_path / "whole")
    assert not read_rejected(ref.rejected)


def test_other_picks_take_no_memory_for_the_files_that_are_there(tmp_path: Path) -> None:
    def peak_bytes(num_pictures: int) -> int:
        folder = tmp_path / f"{num_pictures}"
        (folder / "in").mkdir(parents=True)
        for number in range(num_pictures):
            (folder / "in" / f"{number}.png").touch()
            (folder / "in" / f"{number}.txt").touch()
        build_catalog(CatalogConfig(sources=(CatalogSource(path=folder / "in"),), out=folder / "catalog", processes=1))
        catalog = Catalog.open(folder / "catalog")

        def placed(records: np.ndarray[Any, Any]) -> int:
            options: Any = {"settings": {"query": ""}, "how": "hardlink", "out": folder / "out", "shard_size": 100}
            return subset_records(catalog, records, **options).num_kept

        assert placed(np.arange(num_pictures)) == num_pictures
        tracemalloc.start()
        try:
            assert placed(np.arange(1, num_pictures)) == num_pictures - 1  # every shard is another one now
            return tracemalloc.get_traced_memory()[1]
        finally:
            tracemalloc.stop()

    few = peak_bytes(200)
    assert peak_bytes(1_400) - few < 200 * 1_200  # 200 bytes a picture; two files of each are known
