"""What is wanted against what is held: adding, removing, replacing and moving pictures cost exactly those pictures."""

import json
import os
import random
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.latent_sets import collection, committed, contents, snapshot
from support.pictures import encoded, picture
from support.rows import catalog_of
from support.tars import write_tar

from sdxl_core.catalog.build import build_catalog
from sdxl_core.catalog.config import CatalogConfig, CatalogSource
from sdxl_core.config import CacheLatentsConfig, SubsetConfig
from sdxl_core.errors import ConfigError, DataError
from sdxl_core.latents import encode
from sdxl_core.latents.cache import cache_latents, plan_latents
from sdxl_core.latents.index import LatentIndex
from sdxl_core.latents.matching import HashTable, NameTable
from sdxl_core.rejected import read_rejected
from sdxl_core.subset.stage import subset

encoded_keys: list[str] = []


@pytest.fixture(autouse=True)
def watched(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every picture that goes into the engine is in `encoded_keys`."""
    encoded_keys.clear()

    class Watched(encode.Engine):
        def run(self, groups: Any, *rest: Any) -> Any:
            def seen() -> Any:
                for number, pictures in groups:
                    encoded_keys.extend(one.key for one in pictures)
                    yield number, pictures

            return super().run(seen(), *rest)

    monkeypatch.setattr(encode, "Engine", Watched)


def name_all(config: CacheLatentsConfig, keys: list[str]) -> None:
    config.metadata.write_text(json.dumps({key: {"tags": f"tags of {key}"} for key in keys}, indent=2))


def keys_of(config: CacheLatentsConfig) -> list[str]:
    return list(json.loads(config.metadata.read_text()))


@pytest.mark.parametrize("layout", ["per_image", "packed"])
def test_pictures_that_come_anywhere_cost_themselves(make_job: Any, layout: str) -> None:
    config = make_job(collection(9), shard_size=4, batch_size=2, layout=layout)
    cache_latents(config)
    before = contents(config.out)
    (config.source / "0005.png").write_bytes(encoded(picture(64, 64, seed=77), "PNG"))
    (config.source / "zzz.png").write_bytes(encoded(picture(90, 60, seed=78), "PNG"))
    name_all(config, ["0005", *keys_of(config), "zzz"])
    encoded_keys.clear()
    ref = cache_latents(config)
    assert sorted(encoded_keys) == ["0005", "zzz"]
    after = contents(config.out)
    assert (ref.num_kept, list(after)) == (11, keys_of(config))
    assert {key: after[key] for key in before} == before


@pytest.mark.parametrize("layout", ["per_image", "packed"])
def test_a_narrower_metadata_keeps_what_was_encoded_and_lists_what_is_wanted(make_job: Any, layout: str) -> None:
    config = make_job(collection(9), shard_size=4, layout=layout)
    cache_latents(config)
    everything, whole = keys_of(config), snapshot(config.out)
    before = contents(config.out)
    name_all(config, everything[3:5])
    encoded_keys.clear()
    assert cache_latents(config).num_kept == 2
    assert list(json.loads((config.out / "meta_lat.json").read_text())) == everything[3:5]
    assert list(contents(config.out)) == everything[3:5] and committed(config.out) == 9
    name_all(config, everything)
    assert cache_latents(config).num_kept == 9
    assert encoded_keys == [] and contents(config.out) == before
    latents = {name for name in whole if name.endswith(".npz")}
    assert {name for name in snapshot(config.out) if name.endswith(".npz")} == latents


@pytest.mark.parametrize("layout", ["per_image", "packed"])
def test_a_replaced_picture_is_encoded_again_and_no_other(make_job: Any, layout: str) -> None:
    config = make_job(collection(9), shard_size=4, batch_size=1, layout=layout)
    cache_latents(config)
    before = contents(config.out)
    (config.source / "004.jpg").write_bytes(encoded(picture(90, 60, seed=99), "JPEG"))
    encoded_keys.clear()
    assert cache_latents(config).num_kept == 9
    assert encoded_keys == ["004"]
    after = contents(config.out)
    assert [key for key in after if after[key] != before[key]] == ["004"]
    encoded_keys.clear()
    assert cache_latents(config).num_kept == 9 and encoded_keys == [], "the replaced row must not come back"
    (config.source / "004.jpg").write_bytes(encoded(picture(90, 60, seed=99), "JPEG")[:200])
    ref = cache_latents(config)
    assert [(row.key, row.reason) for row in read_rejected(ref.rejected)] == [("004", "undecodable")]
    assert "004" not in contents(config.out) and ref.num_kept == 8


def test_an_order_that_changes_costs_nothing(make_job: Any) -> None:
    config = make_job(collection(9), shard_size=4)
    cache_latents(config)
    keys = keys_of(config)
    random.Random(1).shuffle(keys)
    name_all(config, keys)
    encoded_keys.clear()
    cache_latents(config)
    assert encoded_keys == [] and list(json.loads((config.out / "meta_lat.json").read_text())) == keys
    index = LatentIndex.open(config.out / "latents")
    assert [key for batch in index.chunks(["key"]) for key in batch["key"].to_pylist()] == keys


def test_keys_that_are_called_otherwise_keep_their_latents(make_job: Any) -> None:
    config = make_job(collection(5))
    cache_latents(config)
    before = contents(config.out)
    name_all(config, [f"{config.source}/{name}" for name in sorted(collection(5))])
    encoded_keys.clear()
    cache_latents(config)
    assert encoded_keys == [] and list(contents(config.out).values()) == [before[key] for key in sorted(before)]


def test_other_shard_and_commit_sizes_leave_shards_as_they_were_cut(make_job: Any) -> None:
    config = make_job(collection(9), shard_size=4)
    cache_latents(config)
    encoded_keys.clear()
    assert len(plan_latents(config.model_copy(update={"shard_size": 2, "commit_size": 1})).shards) == 3
    cache_latents(config.model_copy(update={"shard_size": 2, "commit_size": 1}))
    assert encoded_keys == []


def test_a_catalog_of_folders_and_tars_is_read_in_place(make_job: Any, tmp_path: Path) -> None:
    files = collection(8)
    names = list(files)
    config = make_job({name: files[name] for name in names[:3]})
    write_tar(tmp_path / "tars" / "0.tar", {name: files[name] for name in names[3:]})
    sources = (CatalogSource(path=config.source), CatalogSource(path=tmp_path / "tars", prefix="t/"))
    build_catalog(CatalogConfig(sources=sources, out=tmp_path / "catalog"))
    stems = [name.rpartition(".")[0] for name in names]
    config = config.model_copy(update={"source": tmp_path / "catalog"})
    name_all(config, [*stems[:3], *(f"t/{stem}" for stem in stems[3:]), "t/none"])
    ref = cache_latents(config)
    assert [(row.key, row.reason) for row in read_rejected(ref.rejected)] == [("t/none", "missing_image")]
    (tmp_path / "tars" / "0.tar").rename(tmp_path / "tars" / "0.gone")
    assert cache_latents(config) == ref, "a finished set does not ask for its pictures"
    found = contents(config.out)
    folder = make_job(files, out=tmp_path / "plain")
    cache_latents(folder)
    expected = {stem if number < 3 else f"t/{stem}": contents(folder.out)[stem] for number, stem in enumerate(stems)}
    assert found == expected
    assert (config.out / "latents" / "t" / f"{stems[3]}.npz").is_file()


def test_sources_of_a_catalog_may_be_single_files(make_job: Any, tmp_path: Path) -> None:
    files = collection(6)
    names = list(files)
    config = make_job({name: files[name] for name in names[:3]})
    write_tar(tmp_path / "0000.tar", {name: files[name] for name in names[3:]})
    words = tmp_path / "words.jsonl"
    words.write_text(json.dumps({"id": names[0].rpartition(".")[0], "tags": ["a"]}) + "\n")
    sources = tuple(CatalogSource(path=path) for path in (config.source, tmp_path / "0000.tar", words))
    build_catalog(CatalogConfig(sources=sources, out=tmp_path / "catalog"))
    config = config.model_copy(update={"source": tmp_path / "catalog"})
    name_all(config, [name.rpartition(".")[0] for name in names])
    assert cache_latents(config).num_kept == len(names)
    assert contents(config.out) == contents(cache_latents(make_job(files, out=tmp_path / "plain")).path.parent)


def test_a_manifest_names_the_places(make_job: Any, tmp_path: Path) -> None:
    files = collection(6)
    config = make_job(files)
    for name in files:
        (config.source / name).with_suffix(".txt").write_text("a, b" if name < "003" else "a")
    ref = subset(SubsetConfig(source=config.source, query="b", how="manifest", out=tmp_path / "picked"))
    config = config.model_copy(update={"source": ref.catalog, "manifest": ref.path / "manifest.arrow"})
    name_all(config, ["000", "001", "002", "004"])
    told = cache_latents(config)
    assert (told.num_kept, told.num_rejected) == (3, 1)
    encoded_keys.clear()
    assert cache_latents(config) == told and encoded_keys == []


def test_a_catalog_without_pictures_is_refused(make_job: Any, tmp_path: Path) -> None:
    config = make_job(collection(2))
    catalog_of(tmp_path, [[{"key": "000"}]], kind="json")
    with pytest.raises(ConfigError, match="knows no pictures"):
        plan_latents(config.model_copy(update={"source": tmp_path / "catalog"}))


def test_a_source_that_is_gone_while_a_shard_is_open_rejects_nothing(make_job: Any, tmp_path: Path) -> None:
    config = make_job({name: data for name, data in collection(4).items() if "/" not in name})
    build_catalog(CatalogConfig(sources=(CatalogSource(path=config.source),), out=tmp_path / "catalog"))
    config = config.model_copy(update={"source": tmp_path / "catalog"})
    plan_latents(config)
    (tmp_path / "in").rename(tmp_path / "unmounted")
    with pytest.raises(ConfigError, match="is its disk mounted"):
        cache_latents(config)
    (tmp_path / "unmounted").rename(tmp_path / "in")
    assert cache_latents(config).num_kept == 3


def test_a_finished_set_is_not_planned_again(make_job: Any, monkeypatch: Any) -> None:
    config = make_job(collection(5))
    ref = cache_latents(config)

    def never(*_: Any) -> None:
        raise AssertionError("planned again")

    monkeypatch.setattr("sdxl_core.latents.plan._new_plan", never)
    assert cache_latents(config) == ref
    os.utime(config.metadata, ns=(1, 1))
    with pytest.raises(AssertionError, match="planned again"):
        cache_latents(config)


@pytest.mark.parametrize("name", ["plan.arrow", "plan.rejected.jsonl", "set.json", "set.rejected.jsonl"])
def test_lists_of_ours_that_are_damaged_are_made_again(make_job: Any, name: str) -> None:
    config = make_job(collection(5) | {"bad.png": b"x"})
    cache_latents(config)
    before = snapshot(config.out)
    path = config.out / "latents" / ".ledger" / name
    whole = path.read_bytes()
    for content in (None, b"", whole[:-5], whole[: len(whole) // 2] + b"\0" + whole[len(whole) // 2 + 1 :]):
        if content is None:
            path.unlink()
        else:
            path.write_bytes(content)
        try:
            cache_latents(config)
        except DataError as error:
            assert "again" in str(error)
            cache_latents(config)
        assert snapshot(config.out) == before


@settings(max_examples=40, deadline=None)
@given(st.lists(st.text(max_size=6), max_size=30), st.lists(st.text(max_size=6), max_size=30))
def test_names_are_found_where_they_stand_first(have: list[str], wanted: list[str]) -> None:
    found = NameTable(pa.array(have, pa.large_string())).find(wanted)
    assert found.tolist() == [have.index(name) if name in have else -1 for name in wanted]


def test_names_that_share_a_hash_are_told_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        "sdxl_core.latents.matching.key_hashes", lambda keys: pa.array(np.full(len(keys), 5, np.uint64))
    )
    table = NameTable(pa.array(["a", "b", "a", "c"], pa.large_string()))
    assert table.find(["c", "a", "x", "b"]).tolist() == [3, 0, -1, 1]


def test_hashes_are_found() -> None:
    table = HashTable(np.array([5, 3, 3, 9], np.uint64))
    assert table.find(np.array([3, 9, 10, 0], np.uint64)).tolist() == [1, 3, -1, -1]
    assert HashTable(np.zeros(0, np.uint64)).find(np.array([1], np.uint64)).tolist() == [-1]
