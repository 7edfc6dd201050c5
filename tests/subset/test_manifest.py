"""A manifest says where every picked picture is, and is written whole or not at all."""

import json
import tarfile
from pathlib import Path

import numpy as np
import orjson
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from support.rows import catalog_of

from sdxl_core.catalog.images import ImageReader
from sdxl_core.catalog.records import Catalog
from sdxl_core.config import JobConfig
from sdxl_core.errors import ConfigError, DataError
from sdxl_core.merge.plan import merge_tags
from sdxl_core.refs import SubsetRef
from sdxl_core.rejected import read_rejected
from sdxl_core.subset.manifest import Manifest
from sdxl_core.subset.picks import BATCH
from sdxl_core.subset.run import subset_records
from sdxl_core.subset.stage import subset


@pytest.fixture
def catalog(tmp_path: Path) -> Catalog:
    """Two plain pictures, two in a tar of another source, and words without a picture."""
    (tmp_path / "source0").mkdir()
    (tmp_path / "source1").mkdir()
    for name in ("a", "b", "c", "d"):
        (tmp_path / "source0" / f"{name}.png").write_bytes(name.encode() * 700)
    plain = [{"key": name, "image": f"{name}.png", "num_bytes": 700} for name in ("a", "b")]
    with tarfile.open(tmp_path / "source1" / "0.tar", "w") as tar:
        for name in ("c", "d"):
            tar.add(tmp_path / "source0" / f"{name}.png", f"{name}.png")
    with tarfile.open(tmp_path / "source1" / "0.tar") as tar:
        packed = [
            {"key": f"p/{m.name[:-4]}", "image": m.name, "tar": "0.tar", "offset": m.offset_data, "num_bytes": m.size}
            for m in tar
        ]
    return catalog_of(tmp_path, [plain, [*packed, {"key": "words", "caption": "Only words."}]])


def pick(catalog: Catalog, records: list[int], query: str = "q") -> SubsetRef:
    return subset_records(
        catalog, np.array(records), settings={"query": query}, how="manifest", out=catalog.path.parent / "out"
    )


def test_every_row_leads_to_the_bytes_of_its_picture(catalog: Catalog) -> None:
    ref = pick(catalog, [3, 0, 4, 2])
    manifest = Manifest.open(ref.path)
    keys = [key for batch in manifest.chunks(["key"]) for key in batch["key"].to_pylist()]
    assert keys == ["p/d", "a", "p/c"]
    with ImageReader() as reader:
        assert [reader.read(manifest.place(row)) for row in range(3)] == [key[-1].encode() * 700 for key in keys]
    assert (manifest.catalog_digest, manifest.query, manifest.num_records) == (catalog.digest, "q", 3)
    assert [row for batch in manifest.chunks(["record"]) for row in batch["record"].to_pylist()] == [3, 0, 2]
    assert [(row.key, row.reason) for row in read_rejected(ref.rejected)] == [("words", "no_image")]
    assert (ref.num_seen, ref.num_kept, ref.num_unmatched, ref.num_rejected) == (5, 3, 1, 1)
    assert ref.missing["image"] == 1
    with pytest.raises(IndexError):
        manifest.place(3)


def test_a_second_run_writes_nothing_and_other_picks_replace_it(catalog: Catalog) -> None:
    first = pick(catalog, [0, 1])
    before = {path: path.stat().st_ino for path in first.path.iterdir()}
    assert pick(catalog, [0, 1]) == first
    assert {path: path.stat().st_ino for path in first.path.iterdir()} == before
    other = pick(catalog, [1])
    assert other.digest != first.digest and Manifest.open(other.path).num_records == 1
    with pytest.raises(ConfigError, match="query = 'q'; now it is 'z'"):
        pick(catalog, [1], query="z")


def test_a_manifest_that_was_cut_is_found_and_written_again(catalog: Catalog) -> None:
    ref = pick(catalog, [0, 1])
    path = ref.path / "manifest.arrow"
    whole = path.read_bytes()
    for kept in (0, 7, len(whole) // 2, len(whole) - 1):
        path.unlink()
        path.write_bytes(whole[:kept])
        with pytest.raises(DataError, match="damaged"):
            Manifest.open(ref.path)
        assert pick(catalog, [0, 1]) == ref and path.read_bytes() == whole


def test_a_manifest_of_somebody_else_is_not_overwritten(catalog: Catalog) -> None:
    (catalog.path.parent / "out").mkdir()
    (catalog.path.parent / "out" / "manifest.arrow").write_bytes(b"mine")
    with pytest.raises(DataError, match="not ours"):
        pick(catalog, [0])


def test_no_manifest_says_how_to_make_one(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="--how manifest"):
        Manifest.open(tmp_path)


def test_rows_of_many_batches_stay_in_order(tmp_path: Path) -> None:
    rows = [{"key": f"{number}", "image": f"{number}.png" if number % 3 else None} for number in range(2 * BATCH + 5)]
    catalog = catalog_of(tmp_path, [rows], part_rows=9_000)
    records = np.random.default_rng(0).permutation(len(rows))
    ref = pick(catalog, records.tolist())
    manifest = Manifest.open(ref.path)
    kept = [number for number in records.tolist() if number % 3]
    assert [key for batch in manifest.chunks(["key"]) for key in batch["key"].to_pylist()] == [f"{n}" for n in kept]
    assert manifest.place(BATCH - 1).path.name == f"{kept[BATCH - 1]}.png"
    assert ref.num_rejected == len(rows) - len(kept) == ref.missing["image"]


def test_a_catalog_of_metadata_alone_is_listed_not_placed(tmp_path: Path) -> None:
    from sdxl_core.catalog.build import build_catalog
    from sdxl_core.catalog.config import CatalogConfig
    from sdxl_core.config import MergeTagsConfig, SubsetConfig
    from sdxl_core.merge.plan import merge_tags
    from sdxl_core.subset.stage import subset

    dump = pa.table({"id": [5, 6, 7], "tag_string": ["a b", "b", "a c"]})
    pq.write_table(dump, tmp_path / "posts.parquet")
    build_catalog(CatalogConfig.model_validate({"sources": [str(tmp_path / "posts.parquet")], "out": tmp_path / "c"}))
    config = SubsetConfig(source=tmp_path / "c", query="a", how="manifest", out=tmp_path / "picked")
    ref = subset(config)
    assert (ref.num_kept, ref.num_unmatched, ref.num_rejected) == (2, 1, 0)
    manifest = tmp_path / "picked" / "manifest.arrow"
    merged = merge_tags(MergeTagsConfig(source=tmp_path / "c", manifest=manifest, out=tmp_path / "m.json"))
    assert orjson.loads(merged.path.read_bytes()) == {"5": {"tags": "a, b"}, "7": {"tags": "a, c"}}
    with pytest.raises(DataError, match="metadata alone"):
        Manifest.open(manifest).place(0)
    with pytest.raises(ConfigError, match="how = copy: no source"):
        subset(config.model_copy(update={"how": "copy", "out": tmp_path / "files"}))


def test_in_a_job_nothing_is_copied(tmp_path: Path) -> None:
    for name, tags in (("a", "red"), ("b", "blue")):
        (tmp_path / "in").mkdir(exist_ok=True)
        (tmp_path / "in" / f"{name}.png").write_bytes(b"picture")
        (tmp_path / "in" / f"{name}.txt").write_text(tags)
    job = JobConfig.model_validate(
        {"out": tmp_path / "out", "source": {"path": tmp_path / "in"}, "subset": {"query": "red"}}
    )
    picked = subset(job.subset_config())
    assert picked.how == "manifest" and picked.num_kept == 1
    merged = merge_tags(job.merge_config(picked))
    assert list(json.loads(merged.path.read_bytes())) == ["a"]
    config = job.latents_config(picked)
    (row,) = Manifest.open(config.manifest or tmp_path).chunks(["image", "root"])
    assert [tmp_path / "in" / row["image"][0].as_py()] == [path for path in tmp_path.rglob("*.png") if "a" in path.stem]
