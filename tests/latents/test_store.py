"""Reading latents by key, in either layout and without an index."""

import os
import threading
import tracemalloc
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sdxl_core.catalog.parts import key_hash, key_hashes
from sdxl_core.errors import ShardError
from sdxl_core.latents import LatentRecord, LatentStore
from sdxl_core.latents.formats import WrittenFile, per_image_name, write_packed, write_per_image
from sdxl_core.latents.index import IndexWriter


def record(seed: int, height: int = 3, width: int = 2) -> LatentRecord:
    latents = np.random.default_rng(seed).normal(size=(4, height, width)).astype(np.float32)
    return LatentRecord(
        latents=latents, original_width_px=640 + seed, original_height_px=1216, crop_ltrb=(0.0, 1.5, 16.0, 22.5)
    )


def write_index(folder: Path, layout: str, rows: list[tuple[str, LatentRecord, int, int, int]], files: Any) -> None:
    """`rows`: key, record, file, row, checksum; `files`: path, num_bytes."""
    records = [item for _, item, _, _, _ in rows]
    with IndexWriter(folder, fingerprint="f", made_from="m") as index:
        index.add_files(pa.array([path for path, _ in files]), np.array([size for _, size in files]), layout)
        crops = zip(*(item.crop_ltrb for item in records), strict=True)
        crop_columns = zip(("crop_left", "crop_top", "crop_right", "crop_bottom"), map(list, crops), strict=True)
        index.add(
            {
                "key": [row[0] for row in rows],
                "bucket_width_px": [item.bucket[0] for item in records],
                "bucket_height_px": [item.bucket[1] for item in records],
                "original_width_px": [item.original_width_px for item in records],
                "original_height_px": [item.original_height_px for item in records],
                "file": [row[2] for row in rows],
                "row": [row[3] for row in rows],
                "crc32": [row[4] for row in rows],
                **dict(crop_columns),
            }
        )
        index.finish(metadata_sha256="")


def make_set(folder: Path, layout: str, num: int = 7) -> dict[str, LatentRecord]:
    """A set with an index, three rows a packed file."""
    items = {f"deep/{number:03}": record(number) for number in range(num)}
    keys, rows, files = list(items), [], []
    if layout == "per_image":
        for number, (key, item) in enumerate(items.items()):
            written = write_per_image(folder / f"{key}.npz", item)
            files.append((f"{key}.npz", written.num_bytes))
            rows.append((key, item, number, -1, written.crc32))
    else:
        for start in range(0, num, 3):
            some = keys[start : start + 3]
            name = f"packed/16x24/{start}.npz"
            written = write_packed(folder / name, some, [items[key] for key in some], "float32")
            rows += [(key, items[key], len(files), at, written.row_crc32s[at]) for at, key in enumerate(some)]
            files.append((name, written.num_bytes))
    write_index(folder, layout, rows, files)
    return items


def assert_same(one: LatentRecord, other: LatentRecord) -> None:
    assert np.array_equal(one.latents, other.latents) and one.crop_ltrb == other.crop_ltrb
    assert one.original_width_px == other.original_width_px


@pytest.mark.parametrize("layout", ["per_image", "packed"])
def test_both_layouts_are_read_alike(tmp_path: Path, layout: str) -> None:
    items = make_set(tmp_path, layout)
    store = LatentStore(tmp_path)
    assert store.keys == tuple(items)
    for key, item in items.items():
        assert store.has(key) and store.bucket(key) == (16, 24) and store.path(key).is_file()
        assert_same(store.read(key), item)
    assert not store.has("deep/1")
    with pytest.raises(ShardError, match="no latents of 'deep/1'"):
        store.read("deep/1")


@pytest.mark.parametrize("layout", ["per_image", "packed"])
def test_a_whole_file_in_the_place_of_another_is_not_read(tmp_path: Path, layout: str) -> None:
    make_set(tmp_path, layout)
    store = LatentStore(tmp_path)
    one, other = store.path("deep/000"), store.path("deep/004")
    os.replace(other, one)
    assert not LatentStore(tmp_path).has("deep/004")
    for key in ("deep/000", "deep/004"):
        with pytest.raises(ShardError, match=r"committed|are gone"):
            store.read(key)


def num_open(folder: Path) -> int:
    """Files below a folder that this process has open."""
    names = []
    for handle in os.listdir("/proc/self/fd"):
        with suppress(FileNotFoundError):
            names.append(os.readlink(f"/proc/self/fd/{handle}"))
    return sum(name.startswith(str(folder)) for name in names)


def test_few_files_stay_open(tmp_path: Path) -> None:
    items = make_set(tmp_path, "packed", 30)
    store = LatentStore(tmp_path, max_open=2)
    for key, item in [*items.items(), *reversed(items.items())]:
        assert_same(store.read(key), item)
    assert num_open(tmp_path / "packed") == 2
    del store
    assert num_open(tmp_path / "packed") == 0


@pytest.mark.parametrize("layout", ["per_image", "packed"])
def test_threads_share_a_store(tmp_path: Path, layout: str) -> None:
    items = make_set(tmp_path, layout, 12)
    store, wrong = LatentStore(tmp_path, max_open=1), []

    def read(seed: int) -> None:
        keys = list(items)
        for at in np.random.default_rng(seed).integers(0, len(keys), 200).tolist():
            if not np.array_equal(store.read(keys[at]).latents, items[keys[at]].latents):
                wrong.append(keys[at])

    threads = [threading.Thread(target=read, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


@pytest.mark.parametrize("layout", ["per_image", "packed"])
def test_a_store_works_on_in_forked_processes(tmp_path: Path, layout: str) -> None:
    items = make_set(tmp_path, layout, 9)
    store = LatentStore(tmp_path)
    store.read("deep/000")
    children = []
    for _ in range(2):
        child = os.fork()
        if not child:
            same = all(np.array_equal(store.read(key).latents, items[key].latents) for key in items for _ in range(20))
            os._exit(0 if same else 1)
        children.append(child)
    for key, item in items.items():
        assert_same(store.read(key), item)
    assert [os.waitpid(child, 0)[1] for child in children] == [0, 0]


def test_memory_does_not_grow_with_the_pictures(tmp_path: Path) -> None:
    num = 150_000
    item = record(0)
    written = write_per_image(tmp_path / "a.npz", item)
    rows = [(f"deep/{number:06}", item, 0, -1, written.crc32) for number in range(num)]
    write_index(tmp_path, "per_image", rows, [("a.npz", written.num_bytes)])
    tracemalloc.start()
    store = LatentStore(tmp_path)
    for number in range(0, num, 1000):
        assert_same(store.read(f"deep/{number:06}"), item)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 1_500_000  # a Python object a picture would be ten times that


def save(path: Path, item: LatentRecord) -> WrittenFile:
    return write_per_image(path, item)


def test_a_cache_of_sd_scripts_is_found_by_names(tmp_path: Path) -> None:
    save(tmp_path / "deep" / "one.npz", record(1))
    save(tmp_path / per_image_name("deep/two", "size", width_px=642, height_px=1216), record(2))
    save(tmp_path / "flat.npz", record(3))
    (tmp_path / "deep" / "one_te_outputs.npz").write_bytes(b"")
    store = LatentStore(tmp_path)
    assert store.keys == ("flat", "deep/one", "deep/two")
    for seed, keys in (
        (1, ("deep/one", "deep/one.png")),
        (2, ("deep/two", "deep/two.WEBP")),
        (3, ("H:\\x\\flat.jpg",)),
    ):
        for key in keys:
            assert store.has(key)
            assert_same(store.read(key), record(seed))
    assert store.bucket("deep/two") == (16, 24)
    assert_same(store.read(str(tmp_path / "deep" / "one.png")), record(1))
    for key in ("other/flat", "tw", "deep", "one"):  # a name in another folder is another picture
        assert not store.has(key)
        with pytest.raises(ShardError, match="are gone"):
            store.read(key)


@given(st.text(max_size=40))
def test_the_hash_of_one_key_is_that_of_the_index(key: str) -> None:
    key = key.encode("utf-8", "replace").decode()
    assert key_hash(key) == key_hashes(pa.array([key], pa.string()))[0].as_py()
