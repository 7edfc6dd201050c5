"""A catalog's records as meta_cap_dd.json: the same as one record at a time, whatever the shards."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from support.rows import catalog_of

from sdxl_core.catalog.build import build_catalog
from sdxl_core.catalog.config import CatalogConfig, CatalogSource
from sdxl_core.catalog.schema import CATEGORIES
from sdxl_core.config import MergeTagsConfig
from sdxl_core.errors import DataError
from sdxl_core.merge.clean import clean_tags
from sdxl_core.merge.plan import merge_tags
from sdxl_core.rejected import read_rejected

Row = Mapping[str, Any]
ORDER = ("artist", "character", "copyright", "general", "meta")

WORDS = ["1girl", "long_hair", "long hair", "Long_Hair", "^_^", "rating:safe", "rating"]
words = st.sampled_from([*WORDS, 'quo"te', "back\\slash", "日本", "é", "a\tb"])
tags = st.none() | st.dictionaries(st.sampled_from(CATEGORIES), st.lists(words, max_size=4), max_size=4)
texts = st.none() | st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), max_size=8)
rows_of_one = st.lists(
    st.fixed_dictionaries({"tags": tags, "caption": texts, "image": st.just("x.png")}), min_size=1, max_size=12
)


def one_at_a_time(rows: Sequence[Row], config: MergeTagsConfig) -> dict[str, dict[str, str]]:
    """The reference: every row by itself, in plain Python."""
    metadata: dict[str, dict[str, str]] = {}
    for row in rows:
        entry = {}
        if row["caption"] is not None:
            entry["caption"] = row["caption"]
        if row["tags"]:
            stored = {category: list(dict.fromkeys(row["tags"].get(category, []))) for category in CATEGORIES}
            order = dict.fromkeys([*config.category_order, *CATEGORIES])
            flat = [tag for name in order if name not in config.drop_categories for tag in stored[name]]
            entry["tags"] = config.separator.join(clean_tags(flat, config.clean))
        if entry:
            metadata[row["key"]] = entry
    return metadata


@settings(max_examples=120, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    rows=rows_of_one,
    clean=st.sets(st.sampled_from(["underscores", "repeated", "rating"])),
    order=st.permutations(ORDER),
    dropped=st.sets(st.sampled_from(ORDER), max_size=2),
    num_shards=st.integers(1, 4),
    part_rows=st.integers(1, 6),
)
def test_it_is_what_one_record_at_a_time_gives(
    tmp_path_factory: pytest.TempPathFactory, rows: list[dict[str, Any]], clean: set[str], order: list[str],
    dropped: set[str], num_shards: int, part_rows: int,
) -> None:  # fmt: skip
    folder = tmp_path_factory.mktemp("merge")
    rows = [{**row, "key": f'd/{number}"'} for number, row in enumerate(rows)]
    if all(row["tags"] is None for row in rows):
        rows[0]["tags"] = {}
    rows = [
        {**row, "tags": row["tags"] if row["tags"] is None else row["tags"] | {"": row["tags"].get("", [])}}
        for row in rows
    ]
    catalog = catalog_of(folder, [rows], part_rows=part_rows)
    config = MergeTagsConfig(
        source=catalog.path, out=folder / "m.json", clean=tuple(clean), category_order=tuple(order),
        drop_categories=tuple(dropped), num_shards=num_shards,
    )  # fmt: skip
    expected = one_at_a_time(rows, config)
    if not expected:
        with pytest.raises(DataError, match="usable text"):
            merge_tags(config)
        return
    ref = merge_tags(config)
    assert (folder / "m.json").read_text() == json.dumps(expected, indent=2)
    assert ref.num_kept == len(expected)
    assert ref.num_kept + ref.num_rejected == ref.num_seen == len(rows)
    assert ref.num_empty == sum(not any(entry.values()) for entry in expected.values())


def test_a_folder_and_its_catalog_make_the_same_json(tmp_path: Path) -> None:
    folder = tmp_path / "in"
    for number, (tags_text, caption) in enumerate(
        [
            ("1girl, solo", None),
            ("1girl,  long_hair,,", "two  girls\nat sea"),
            (None, "only words"),
            ("", None),
            (None, None),
        ]
    ):
        for text, ending in ((tags_text, ".txt"), (caption, ".caption")):
            if text is not None:
                (folder / f"b{number % 2}").mkdir(parents=True, exist_ok=True)
                (folder / f"b{number % 2}" / f"{number}{ending}").write_text(text)
        (folder / f"b{number % 2}" / f"{number}.png").write_bytes(b"picture")
    build_catalog(CatalogConfig(sources=(CatalogSource(path=folder),), out=tmp_path / "c"))
    for options in ({}, {"key_style": "full_path"}, {"clean": ("underscores", "repeated")}, {"empty_tags": "reject"}):
        direct = merge_tags(MergeTagsConfig(source=folder, out=tmp_path / "direct.json", **options))
        through = merge_tags(MergeTagsConfig(source=tmp_path / "c", out=tmp_path / "x" / "through.json", **options))
        assert (tmp_path / "direct.json").read_bytes() == (tmp_path / "x" / "through.json").read_bytes()
        assert (direct.num_kept, direct.num_rejected, direct.num_empty) == (
            through.num_kept, through.num_rejected, through.num_empty,
        )  # fmt: skip
        reasons = [[row.reason for row in read_rejected(ref.rejected)] for ref in (direct, through)]
        assert reasons[0] == reasons[1]


def test_words_without_a_picture_are_left_out_and_told(tmp_path: Path) -> None:
    catalog = catalog_of(
        tmp_path,
        [[{"key": "a", "image": "a.png"}], [{"key": "b", "tags": {"": ["x"]}}, {"key": "a", "tags": {"": ["y"]}}]],
    )
    ref = merge_tags(MergeTagsConfig(source=catalog.path, out=tmp_path / "m.json"))
    assert json.loads(ref.path.read_bytes()) == {"a": {"tags": "y"}}
    assert [(row.key, row.reason) for row in read_rejected(ref.rejected)] == [("b", "no_image")]


def test_a_second_merge_of_an_unchanged_catalog_reads_no_record(tmp_path: Path) -> None:
    catalog = catalog_of(tmp_path, [[{"key": str(n), "image": "i", "tags": {"": [f"t{n}"]}} for n in range(9)]])
    config = MergeTagsConfig(source=catalog.path, out=tmp_path / "m.json", num_shards=3)
    first = merge_tags(config)
    for file in (catalog.path / "parts").iterdir():
        file.write_bytes(b"")  # whoever reads a record now, fails
    assert merge_tags(config) == first


def test_categories_of_tags_are_written_beside_the_metadata(tmp_path: Path) -> None:
    """Training can then drop tags by category; tags in the form in which they are compared."""
    rows = [
        {"key": "a", "tags": {"artist": ["Some_Artist"], "general": ["long hair", "Long_Hair"]}, "image": "x.png"},
        {"key": "b", "tags": {"character": ["x_(y)"], "": ["nobody told"]}, "image": "y.png"},
    ]
    catalog = catalog_of(tmp_path, [[{"caption": None, **row} for row in rows]])
    merge_tags(MergeTagsConfig(source=catalog.path, out=tmp_path / "m.json"))
    assert json.loads((tmp_path / "tag_categories.json").read_bytes()) == {
        "artist": ["some_artist"], "character": ["x_(y)"], "general": ["long_hair"],
    }  # fmt: skip
