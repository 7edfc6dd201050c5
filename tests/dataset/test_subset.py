"""Subsets: exact tags, copies that are never torn and never overwrite, a query that matches nothing is explained."""

from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sdxl_core.config import SubsetConfig
from sdxl_core.dataset.query import TagQuery
from sdxl_core.dataset.subset import subset
from sdxl_core.dataset.text import normalise_tag
from sdxl_core.errors import ConfigError, DataError
from sdxl_core.refs import SubsetRef
from sdxl_core.rejected import read_rejected

TAGS = {
    "1": "astolfo (fate), pink hair",
    "2": "astolfo_\\(fate\\), comic",
    "3": "astolfo (fate) (cosplay), pink_hair",
    "deep/4": "Astolfo (Fate),solo\npink hair",
    "5": "fate",
}


@pytest.fixture
def source(tmp_path: Path) -> Path:
    for name, tags in TAGS.items():
        path = tmp_path / "in" / f"{name}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"picture " + name.encode())
        path.with_suffix(".txt").write_text(tags)
    (tmp_path / "in" / "1.caption").write_text("A knight.")
    (tmp_path / "in" / "6.png").write_bytes(b"no text")
    return tmp_path / "in"


def pick(source: Path, query: str, **options: Any) -> SubsetRef:
    return subset(SubsetConfig(source=source, query=query, out=source.parent / "out", **options))


def pictures(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder).with_suffix("")) for path in folder.rglob("*.png"))


@pytest.mark.parametrize(
    ("query", "expected"),
    [
        ("astolfo_(fate)", ["1", "2", "deep/4"]),
        ("astolfo_(fate) pink_hair", ["1", "deep/4"]),
        ('"pink hair" -astolfo_(fate)', ["3"]),
        ("astolfo_(fate) -comic -solo", ["1"]),
        ("fate", ["5"]),
        ("", ["1", "2", "3", "5", "6", "deep/4"]),
    ],
)
def test_a_query_picks_exact_tags(source: Path, query: str, expected: list[str]) -> None:
    ref = pick(source, query)
    assert pictures(source.parent / "out") == expected
    assert ref.num_kept + ref.num_unmatched + ref.num_rejected == ref.num_seen == 6
    assert [row.reason for row in read_rejected(ref.rejected)] == (["no_caption"] if query else [])


def test_texts_and_captions_come_along_unchanged(source: Path) -> None:
    pick(source, "astolfo_(fate)")
    for name in ("1.png", "1.txt", "1.caption", "deep/4.txt"):
        copy = source.parent / "out" / name
        assert copy.read_bytes() == (source / name).read_bytes()
        assert copy.stat().st_mtime_ns == (source / name).stat().st_mtime_ns


def test_a_second_run_copies_nothing_and_a_missing_copy_comes_back(source: Path, monkeypatch: Any) -> None:
    first = pick(source, "fate")
    (source.parent / "out" / "5.txt").unlink()
    assert pick(source, "fate") == first
    assert (source.parent / "out" / "5.txt").exists()

    def no_copying(*_: Any) -> None:
        raise AssertionError("copied again")

    monkeypatch.setattr("shutil.copyfileobj", no_copying)
    assert pick(source, "fate") == first


def test_a_different_file_is_never_overwritten(source: Path) -> None:
    (source.parent / "out").mkdir()
    (source.parent / "out" / "5.png").write_bytes(b"precious")
    with pytest.raises(DataError, match=r"5\.png exists with another content"):
        pick(source, "fate")
    assert (source.parent / "out" / "5.png").read_bytes() == b"precious"


def test_the_folder_of_another_query_is_refused(source: Path) -> None:
    pick(source, "fate")
    with pytest.raises(ConfigError, match="query = 'fate'; now it is 'comic'"):
        pick(source, "comic")


def test_a_query_that_matches_nothing_counts_its_terms_and_suggests(source: Path) -> None:
    with pytest.raises(DataError) as caught:
        pick(source, "pink_hiar comic")
    text = str(caught.value)
    assert "none of the 6 pictures" in text and "comic: 1 pictures" in text
    assert "pink_hiar: 0 pictures have it; near it: pink_hair (3)" in text


def test_a_subset_inside_its_source_is_refused(source: Path) -> None:
    with pytest.raises(ConfigError, match="lies inside"):
        subset(SubsetConfig(source=source, query="fate", out=source / "sub"))


@pytest.mark.parametrize("query", ['"long hair', "-", "a -a", '""'])
def test_a_query_that_cannot_be_right_is_told(query: str) -> None:
    with pytest.raises(ConfigError, match="query"):
        TagQuery.parse(query)


tags = st.text("abc_ ()", min_size=1, max_size=6).map(normalise_tag).filter(bool)


@given(has=st.sets(tags), wanted=st.sets(tags), unwanted=st.sets(tags))
def test_a_query_means_all_of_these_and_none_of_those(has: set[str], wanted: set[str], unwanted: set[str]) -> None:
    unwanted -= wanted
    query = TagQuery.parse(" ".join([f'"{tag}"' for tag in wanted] + [f'-"{tag}"' for tag in unwanted]))
    assert query.matches(has) == (wanted <= has and not unwanted & has)
