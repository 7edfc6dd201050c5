"""What pictures lack is counted by kind: the same of a folder, of its catalog, and whatever the shards."""

from pathlib import Path

import pytest

from sdxl_core.catalog.build import build_catalog
from sdxl_core.catalog.config import CatalogConfig, CatalogSource
from sdxl_core.config import MergeTagsConfig
from sdxl_core.merge import folder as folder_module
from sdxl_core.merge.join import join_shards
from sdxl_core.merge.plan import merge_shard, merge_tags, plan_merge
from sdxl_core.rejected import read_rejected
from sdxl_core.summary import describe

MISSING = {"image": 3, "tags": 4, "caption": 5, "text": 3}


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """Two with both texts, two with tags alone, one with a caption alone, three with neither; three lonely texts."""
    files = {"a": "tc", "sub/b": "tc", "c": "t", "d": "t", "sub/e": "c", "f": "", "g": "", "sub/h": ""}
    for name, kinds in (files | {"lost": "tc", "sub/lost": "c"}).items():
        path = tmp_path / "in" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if name in files:
            path.with_suffix(".png").write_bytes(b"picture")
        if "t" in kinds:
            path.with_suffix(".txt").write_text("" if name == "d" else "red")
        if "c" in kinds:
            path.with_suffix(".caption").write_text("Red.")
    return tmp_path / "in"


def test_a_folder_tells_what_its_catalog_tells(source: Path, tmp_path: Path) -> None:
    of_folder = merge_tags(MergeTagsConfig(source=source, out=tmp_path / "m.json"))
    built = build_catalog(CatalogConfig(sources=(CatalogSource(path=source),), out=tmp_path / "catalog", processes=1))
    of_catalog = merge_tags(MergeTagsConfig(source=tmp_path / "catalog", out=tmp_path / "c.json"))
    assert (of_folder.missing, of_folder.num_seen, of_folder.num_kept) == (MISSING, 8, 5)
    assert [row.reason for row in read_rejected(built.rejected)].count("no_image") == MISSING["image"]
    assert of_catalog.missing == MISSING | {"image": 0}  # it was built without them
    assert "; 4 without tags, 5 without caption, 3 without either, 3 texts without a picture -> " in describe(of_folder)


def test_planned_shards_and_a_second_run_tell_the_same(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(folder_module, "ENTRIES_A_WRITE", 2)
    for num_shards in (1, 3, 8):
        config = MergeTagsConfig(source=source, out=tmp_path / f"{num_shards}.json", num_shards=num_shards)
        planned = join_shards(config, [merge_shard(shard, config) for shard in plan_merge(config)])
        assert planned.missing == MISSING
        assert merge_tags(config) == planned
        first = merge_tags(config.model_copy(update={"out": tmp_path / f"first{num_shards}.json"}))
        assert first.missing == MISSING


def test_a_text_that_cannot_be_read_is_rejected_and_not_missing(source: Path, tmp_path: Path) -> None:
    (source / "c.txt").write_bytes(b"\xff\xfe\x00")
    ref = merge_tags(MergeTagsConfig(source=source, out=tmp_path / "m.json"))
    assert ref.missing == MISSING | {"caption": 4}
    assert ref.num_kept + ref.num_rejected == ref.num_seen == 8
