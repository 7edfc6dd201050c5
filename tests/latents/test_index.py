"""The index of a latent set: rows by number and by key, nothing damaged is served."""

import random
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from sdxl_core.errors import DataError, ShardError
from sdxl_core.latents import LatentStore, index, store
from sdxl_core.latents.index import BATCH_ROWS, ROWS, IndexWriter, LatentIndex
from sdxl_core.latents.tables import checked_json


def columns(keys: list[str], **other: Any) -> dict[str, Any]:
    numbers = np.arange(len(keys))
    made = {field.name: numbers.astype(field.type.to_pandas_dtype()) for field in ROWS if field.type != pa.string()}
    return made | {"key": keys, "tags": [f"tags of {key}" for key in keys], "caption": [None] * len(keys)} | other


def write(folder: Path, keys: list[str], *, piece: int = 1000) -> LatentIndex:
    with IndexWriter(folder, fingerprint="f", made_from="m") as writer:
        for start in range(0, len(keys), piece):
            some = keys[start : start + piece]
            first = writer.add_files(pa.array([f"{key}.npz" for key in some]), np.full(len(some), 7), "per_image")
            files = np.arange(first, first + len(some))
            rows = columns(some)
            del rows["key_hash"]
            writer.add(rows | {"file": files, "row": np.full(len(some), -1)})
        writer.finish(metadata_sha256="s")
    return LatentIndex.open(folder)


def test_rows_come_back_by_number_and_by_key_in_the_order_asked(tmp_path: Path) -> None:
    keys = [f"folder/{number:06}é" for number in range(2 * BATCH_ROWS + 10)]
    found = write(tmp_path, keys, piece=50_000)
    assert (found.num_rows, found.fingerprint) == (len(keys), "f")
    sizes = [batch.num_rows for batch in found.chunks(["key"])]
    assert sizes == [BATCH_ROWS, BATCH_ROWS, 10]
    some = random.Random(0).choices(range(len(keys)), k=300)
    taken = found.take(some, ["tags", "key", "file"])
    assert taken["key"].to_pylist() == [keys[row] for row in some]
    assert taken["tags"].to_pylist() == [f"tags of {keys[row]}" for row in some]
    assert found.files(taken["file"].to_numpy())["path"].to_pylist() == [f"{keys[row]}.npz" for row in some]
    store = LatentStore(tmp_path)
    assert [store.path(keys[row]).name for row in some] == [f"{keys[row][7:]}.npz" for row in some]
    assert not store.has("not there") and not store.has("")
    assert found.take([], ["key"]).num_rows == 0
    with pytest.raises(IndexError):
        found.take([len(keys)], ["key"])


def test_keys_that_share_a_hash_are_told_apart(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(index, "key_hashes", lambda keys: pa.array(np.full(len(keys), 5, np.uint64)))
    monkeypatch.setattr(store, "key_hash", lambda key: 5)
    keys = [f"k{number}" for number in range(9)]
    write(tmp_path, keys)
    found = LatentStore(tmp_path)
    assert [found.path(key).name for key in keys] == [f"{key}.npz" for key in keys]
    with pytest.raises(ShardError, match="no latents of 'other'"):
        found.path("other")


def test_an_index_without_rows_is_one(tmp_path: Path) -> None:
    found = write(tmp_path, [])
    assert (found.num_rows, list(found.chunks(["key"]))) == (0, []) and not LatentStore(tmp_path).has("a")


@pytest.mark.parametrize("name", ["index.arrow", "index.files.arrow", "index.keys.arrow"])
def test_a_flipped_byte_is_found_and_never_served(tmp_path: Path, name: str) -> None:
    keys = [f"key {number}" for number in range(20)]
    write(tmp_path, keys)
    whole = (tmp_path / name).read_bytes()
    for place in range(0, len(whole), 7):
        (tmp_path / name).write_bytes(whole[:place] + bytes([whole[place] ^ 1]) + whole[place + 1 :])
        try:
            found, by_key = LatentIndex.open(tmp_path), LatentStore(tmp_path)
            assert found.take(range(20), ["key"])["key"].to_pylist() == keys
            paths = found.files(found.take(range(20), ["file"])["file"].to_numpy())["path"].to_pylist()
            assert paths == [f"{key}.npz" for key in keys] == [by_key.path(key).name for key in keys]
        except DataError as error:
            assert "Run cache-latents again" in str(error)
    (tmp_path / name).write_bytes(whole[:200] + bytes([whole[200] ^ 1]) + whole[201:])
    (tmp_path / name).write_bytes(whole[:-1])
    with pytest.raises(DataError, match="bytes, not"):
        LatentIndex.open(tmp_path)


def test_every_damaged_batch_is_told_by_verify(tmp_path: Path) -> None:
    found = write(tmp_path, [f"key {number}" for number in range(20)])
    assert found.verify() == []
    data = bytearray((tmp_path / "index.arrow").read_bytes())
    place = data.find(b"key 0")
    data[place] ^= 4
    (tmp_path / "index.arrow").write_bytes(data)
    assert len(LatentIndex.open(tmp_path).verify()) == 1


def test_a_write_that_fails_leaves_the_index_that_was_there(tmp_path: Path) -> None:
    write(tmp_path, ["a", "b"])
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    with pytest.raises(RuntimeError), IndexWriter(tmp_path, fingerprint="g", made_from="n") as writer:
        writer.add_files(pa.array(["c.npz"]), np.array([1]), "per_image")
        raise RuntimeError
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


@pytest.mark.parametrize("content", [b"", b"{}", b"[]", b'{"format": 99}', checked_json({"format": 99})])
def test_a_damaged_or_foreign_end_is_told(tmp_path: Path, content: bytes) -> None:
    with pytest.raises(DataError, match="no index"):
        LatentIndex.open(tmp_path)
    (tmp_path / "index.json").write_bytes(content)
    with pytest.raises(DataError, match="index"):
        LatentIndex.open(tmp_path)
