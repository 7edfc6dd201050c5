"""The catalog flow: parts fan out, finished ones are Cached, what was removed behind our back is made again."""

from pathlib import Path

import pytest
from support.pictures import encoded, picture
from support.runs import task_states

from sdxl_core.catalog.config import CatalogConfig
from sdxl_core.catalog.records import Catalog
from sdxl_core.config import MergeTagsConfig

pytestmark = pytest.mark.usefixtures("prefect_server")


def test_a_part_is_read_once_and_again_when_its_files_are_gone(tmp_path: Path) -> None:
    from flows.catalog import catalog
    from flows.merge_tags import merge_tags

    for root in ("a", "b"):
        (tmp_path / root).mkdir()
        for number in range(3):
            (tmp_path / root / f"{number}.png").write_bytes(b"picture")
            (tmp_path / root / f"{number}.txt").write_text(f"{root}, {number}")
    config = CatalogConfig.model_validate(
        {"sources": [f"a/={tmp_path / 'a'}", f"b/={tmp_path / 'b'}"], "out": tmp_path / "catalog"}
    )
    first = catalog(config)
    assert first.num_records == 6
    assert task_states("catalog", num_tasks=4)["build-part: Completed"] == 2
    assert catalog(config) == first
    assert task_states("catalog", num_tasks=4)["build-part: Cached"] == 2
    next((tmp_path / "catalog" / "parts").glob("*.rows.arrow")).unlink()
    assert catalog(config) == first
    states = task_states("catalog", num_tasks=4)
    assert (states["build-part: Cached"], states["build-part: Completed"]) == (1, 1)
    assert Catalog.open(first.path).num_records == 6
    merged = merge_tags(MergeTagsConfig(source=first.path, out=tmp_path / "m.json", num_shards=2))
    assert merged.num_kept == 6


def test_sizes_are_read_in_the_parts_tasks_and_again_when_they_are_gone(tmp_path: Path) -> None:
    from flows.catalog import catalog

    for root in ("a", "b"):
        (tmp_path / root).mkdir()
        for number in range(3):
            (tmp_path / root / f"{number}.png").write_bytes(encoded(picture(40 + number, 30), "PNG"))
    sources = [f"a/={tmp_path / 'a'}", f"b/={tmp_path / 'b'}"]
    config = CatalogConfig.model_validate({"sources": sources, "out": tmp_path / "catalog", "sizes": "read"})
    first = catalog(config)
    assert first.num_sized == 6
    assert catalog(config) == first
    assert task_states("catalog", num_tasks=4)["build-part: Cached"] == 2
    next((tmp_path / "catalog" / "parts").glob("*.sizes.arrow")).unlink()
    assert catalog(config) == first
    states = task_states("catalog", num_tasks=4)
    assert (states["build-part: Cached"], states["build-part: Completed"]) == (1, 1)
