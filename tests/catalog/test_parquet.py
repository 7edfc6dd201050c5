"""Metadata dumps in parquet: the same as reading them row by row, however the file is laid out and cut."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from support.dumps import danbooru_tables, write_dump

from sdxl_core.catalog.build import build_catalog, plan_catalog
from sdxl_core.catalog.config import CatalogConfig, CatalogSource
from sdxl_core.catalog.records import Catalog
from sdxl_core.catalog.schema import CATEGORIES
from sdxl_core.catalog.sources import parquet
from sdxl_core.errors import ConfigError, DataError
from sdxl_core.refs import CatalogRef
from sdxl_core.rejected import read_rejected
from sdxl_core.summary import describe

COLUMNS = ["key", "id", "width", "height", "rating", "score", "fav_count", "tags", "caption"]
Row = dict[str, Any]


def build(out: Path, *sources: CatalogSource, processes: int = 1) -> CatalogRef:
    ref = build_catalog(CatalogConfig(sources=sources, out=out, processes=processes))
    assert ref.num_seen == ref.num_records + ref.num_filtered + ref.num_rejected
    return ref


def told(ref: CatalogRef) -> dict[str, Row]:
    """The records by key, tags as (category, tag)."""
    catalog = Catalog.open(ref.path)
    names = list(zip(catalog.vocabulary["category"].to_pylist(), catalog.vocabulary["tag"].to_pylist(), strict=True))
    rows = [row for chunk in catalog.chunks(COLUMNS) for row in chunk.table.to_pylist()]
    for row in rows:
        row["tags"] = None if row["tags"] is None else [(CATEGORIES[names[t][0]], names[t][1]) for t in row["tags"]]
    return {row.pop("key"): row for row in rows}


def reasons(ref: CatalogRef) -> dict[str, str]:
    return {row.key: row.reason for row in read_rejected(ref.rejected)}


def write(path: Path, columns: Mapping[str, Any], *, index: str = "", **options: Any) -> CatalogSource:
    table = pa.table(
        {name: values if isinstance(values, pa.Array) else pa.array(values) for name, values in columns.items()}
    )
    if index:
        table = table.replace_schema_metadata({"pandas": f'{{"index_columns": ["{index}"], "columns": []}}'})
    pq.write_table(table, path, **options)
    return CatalogSource(path=path)


words = st.sampled_from(["1girl", ";p", "^_^", ":3", "<o>_<o>", "to_heart_(series)", "日本", "a", "b"])
strings = st.none() | st.lists(words, max_size=5).map(" ".join) | st.sampled_from([" a  b ", "a\tb\n", " "])
lists = st.none() | st.lists(st.none() | words | st.sampled_from(["long hair", " x ", "", "a, b"]), max_size=4)
sentences = st.none() | st.sampled_from(["", " ", "two girls", "one\r\ntwo\n\nthree ", "“é”"])
danbooru = st.lists(
    st.fixed_dictionaries(
        {
            **{f"tag_string_{name}": strings for name in ("artist", "character", "copyright", "general", "meta")},
            "rating": st.sampled_from(["g", "s", "q", "e", "x", "", None]),
            "score": st.none() | st.integers(-100, 2**40),
            "image_width": st.none() | st.integers(0, 9999),
            "caption": sentences,
            "other": sentences,
        }
    ),
    min_size=1,
    max_size=20,
)


def one_at_a_time(row: Row) -> Row:
    """The reference: one row, in plain Python."""
    texts = {name: row[f"tag_string_{name}"] for name in ("artist", "character", "copyright", "general", "meta")}
    tags = [(name, tag) for name, text in texts.items() for tag in (text or "").split()]
    caption = " ".join(part for name in ("caption", "other") if (part := " ".join((row[name] or "").split())))
    return {
        "rating": {"g": 1, "s": 2, "q": 3, "e": 4}.get(row["rating"]),
        "score": row["score"] if row["score"] is None or row["score"] < 2**31 else None,
        "width": row["image_width"],
        "tags": None if all(text is None for text in texts.values()) else list(dict.fromkeys(tags)),
        "caption": caption or None,
    }


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    rows=danbooru,
    group_rows=st.integers(1, 12),
    part_rows=st.integers(1, 9),
    batch_rows=st.integers(1, 7),
    ratings=st.sampled_from([(), ("g", "s"), ("explicit",)]),
    dictionary=st.booleans(),
)
def test_rows_are_what_one_at_a_time_gives(
    tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch, rows: list[Row], group_rows: int,
    part_rows: int, batch_rows: int, ratings: tuple[str, ...], dictionary: bool,
) -> None:  # fmt: skip
    folder = tmp_path_factory.mktemp("dump")
    kinds = dict.fromkeys(rows[0], pa.string()) | {"score": pa.int64(), "image_width": pa.int64()}
    columns = {name: pa.array([row[name] for row in rows], kind) for name, kind in kinds.items()}
    if dictionary:
        columns["rating"] = columns["rating"].dictionary_encode()
    ids = [3 * number + 5 for number in range(len(rows))]
    source = write(folder / "d.parquet", {**columns, "id": ids}, index="id", row_group_size=group_rows)
    source = source.model_copy(
        update={"prefix": "d/", "caption_columns": ("caption", "other", "none"), "ratings": ratings}
    )
    monkeypatch.setattr(parquet, "PART_ROWS", part_rows)
    monkeypatch.setattr(parquet, "BATCH", batch_rows)
    wanted = {"g": 1, "s": 2, "explicit": 4}
    expected = {f"d/{number}": one_at_a_time(row) for number, row in zip(ids, rows, strict=True)}
    expected = {
        key: row for key, row in expected.items() if not ratings or row["rating"] in [wanted[word] for word in ratings]
    }
    if not expected:
        with pytest.raises(DataError, match="nothing usable"):
            build(folder / "c", source)
        return
    ref = build(folder / "c", source)
    assert (ref.num_seen, ref.num_filtered) == (len(rows), len(rows) - len(expected))
    found = told(ref)
    assert list(found) == list(expected)
    assert [row["id"] for row in found.values()] == [int(key[2:]) for key in found]
    assert [{name: row[name] for name in one_at_a_time(rows[0])} for row in found.values()] == list(expected.values())


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    rows=st.lists(
        st.fixed_dictionaries({"general": lists, "artist": lists, "rating": st.none() | st.just(["safe", "x"])}),
        min_size=1,
        max_size=8,
    ),
    large=st.booleans(),
)
def test_list_columns_are_tags_with_spaces(
    tmp_path_factory: pytest.TempPathFactory, rows: list[Row], large: bool
) -> None:
    folder = tmp_path_factory.mktemp("lists")
    kind = pa.large_list(pa.large_string()) if large else pa.list_(pa.string())
    columns = {name: pa.array([row[name] for row in rows], kind) for name in rows[0]}
    source = write(folder / "d.parquet", {"id": list(range(len(rows))), **columns})
    for number, got in enumerate(told(build(folder / "c", source)).values()):
        given_lists = {name: rows[number][name] for name in ("artist", "general", "rating")}
        tags = [(name, tag.strip()) for name, tags in given_lists.items() for tag in tags or () if tag and tag.strip()]
        known = any(tags is not None for tags in given_lists.values())
        assert got["tags"] == (list(dict.fromkeys(tags)) if known else None)
        assert got["rating"] == (1 if given_lists["rating"] else None)


def test_both_generations_of_e621_are_read(tmp_path: Path) -> None:
    old = write(
        tmp_path / "old.parquet",
        {"id": [1, 2], "tag_string": ["fox solo", None], "rating": ["s", "q"], "is_deleted": ["t", "f"],
         "parent_id": [float("nan"), 5.0], "image_width": ["640", "x"]},
    )  # fmt: skip
    new = write(
        tmp_path / "new.parquet",
        {"id": [3, 4], "tags": [["fox", "two tails"], []], "rating": ["e", "s"], "width": [10, 20], "height": [30, 40],
         "score": pa.array([{"up": 1, "total": 7}, None]), "sources": [["a"], None]},
    )  # fmt: skip
    nested = write(
        tmp_path / "nested.parquet",
        {"id": [5], "tags": [{"general": ["a"], "species": ["fox"], "invalid": ["b"]}], "file": [{"width": 5}]},
    )  # fmt: skip
    sources = [source.model_copy(update={"prefix": "e/"}) for source in (old, new, nested)]
    found = told(build(tmp_path / "c", *sources))
    assert [(key, row["tags"]) for key, row in found.items()] == [
        ("e/1", [("", "fox"), ("", "solo")]), ("e/2", None), ("e/3", [("", "fox"), ("", "two tails")]), ("e/4", []),
        ("e/5", [("", "b"), ("general", "a"), ("species", "fox")]),
    ]  # fmt: skip
    assert [row["width"] for row in found.values()] == [640, None, 10, 20, 5]
    assert [row["score"] for row in found.values()] == [None, None, 7, None, None]


def test_chosen_columns_are_used(tmp_path: Path) -> None:
    columns = {"post": [7], "a": ["x, y z"], "b": ["p q"], "long": ["words"], "tag_string": ["no"], "id": [1]}
    source = write(tmp_path / "d.parquet", columns).model_copy(
        update={"id_column": "post", "tag_columns": {"artist": "a", "": "b"}, "caption_columns": ("long",)}
    )
    found = told(build(tmp_path / "c", source))
    assert found["7"]["tags"] == [("", "p"), ("", "q"), ("artist", "x"), ("artist", "y z")]
    assert found["7"]["caption"] == "words"


@pytest.mark.parametrize(
    ("ids", "index", "keys"),
    [
        ({"id": [5, 6]}, "", ["5", "6"]),
        ({"post": [5, 6]}, "post", ["5", "6"]),
        ({"__index_level_0__": [5, 6]}, "__index_level_0__", ["5", "6"]),
        ({"__index_level_0__": [0, 1], "id": [5.0, 6.0]}, "__index_level_0__", ["5", "6"]),
        ({"id": pa.array([5, 6], pa.uint64())}, "", ["5", "6"]),
        ({"id": pa.array([b"5", b"6", b"\xff"], pa.binary())}, "", ["5", "6"]),
        ({"id": pa.array(["5", "6", None]).dictionary_encode()}, "", ["5", "6"]),
        ({"id": ["a/5.webp", "H:\\x\\6.png"]}, "", ["a/5", "6"]),
    ],
)
def test_the_id_is_found(tmp_path: Path, ids: dict[str, Any], index: str, keys: list[str]) -> None:
    count = max(map(len, ids.values()))
    source = write(tmp_path / "d.parquet", {"tag_string": ["a"] * count, **ids}, index=index)
    assert list(told(build(tmp_path / "c", source.model_copy(update={"root_map": {"H:/x/": ""}})))) == keys


@pytest.mark.parametrize(
    ("columns", "options", "message"),
    [
        ({"tag_string": ["a"]}, {}, r"column id or a stored pandas index.*columns tag_string.*`id_column`"),
        ({"id": [1], "md5": ["x"]}, {}, r"says something.*columns id, md5.*`tag_columns or caption_columns`"),
        ({"id": [1], "rating": ["s"]}, {"use": ("tags",)}, r"says something \(tags: tag_string….*`tag_columns"),
        ({"id": [1], "tag_string": ["a"]}, {"id_column": "post"}, r"the column post.*`id_column`"),
        ({"id": [1], "tag_string": ["a"]}, {"tag_columns": {"artist": "who"}}, r"the column who.*`tag_columns`"),
        ({"id": [1], "tag_string": ["a"]}, {"ratings": ("g",)}, r"a column rating.*remove `ratings`"),
    ],
)
def test_a_missing_column_is_named_with_the_option(
    tmp_path: Path, columns: dict[str, Any], options: dict[str, Any], message: str
) -> None:
    source = write(tmp_path / "d.parquet", columns).model_copy(update=options)
    with pytest.raises(DataError, match=message):
        build(tmp_path / "c", source)
    assert not (tmp_path / "c" / "catalog.json").exists()


@pytest.mark.parametrize("keep", [0, 3, 4, 100, -1, -9])
def test_what_is_not_a_whole_parquet_file_is_told(tmp_path: Path, keep: int) -> None:
    source = write(tmp_path / "d.parquet", {"id": list(range(99)), "tag_string": ["a"] * 99})
    source.path.write_bytes(source.path.read_bytes()[:keep])
    with pytest.raises(DataError, match=r"d\.parquet: not a parquet file, or a damaged one"):
        build(tmp_path / "c", source)
    assert not (tmp_path / "c" / "catalog.json").exists()


def test_a_damaged_page_is_told_and_nothing_is_written(tmp_path: Path) -> None:
    texts = [f"tag_{n}" for n in range(5_000)]
    source = write(tmp_path / "d.parquet", {"id": list(range(5_000)), "tag_string": texts}, compression="zstd")
    data = bytearray(source.path.read_bytes())
    data[2_000:30_000] = b"\xff" * 28_000
    source.path.write_bytes(data)
    with pytest.raises(DataError, match="damaged one"):
        build(tmp_path / "c", source)
    assert not (tmp_path / "c" / "catalog.json").exists()


def test_rows_that_cannot_be_used_are_told(tmp_path: Path) -> None:
    tags = [b"fine", b"caf\xe9", b"a\0b", b"x" * 10_000_000, b"fine", b"fine", b"fine", b"fine"]
    columns = {
        "id": ["1", "2", "3", "4", None, "../6", "/7", "1"],
        "tag_string": pa.array(tags, pa.binary()).view(pa.string()),  # a writer that does not check its text
        "caption": pa.array([b'a "quote", 100%'] + [None] * 7, pa.binary()),
    }
    ref = build(tmp_path / "c", write(tmp_path / "d.parquet", columns))
    found = told(ref)
    assert list(found) == ["1"] and found["1"]["caption"] == 'a "quote", 100%'
    assert reasons(ref) == {
        "2": "unreadable_text", "3": "unreadable_text", "4": "text_too_long", "d.parquet row 4": "bad_key",
        "d.parquet row 5": "bad_key", "d.parquet row 6": "bad_key", "1": "duplicate_key",
    }  # fmt: skip


def test_a_column_that_is_there_twice_is_told(tmp_path: Path) -> None:
    table = pa.Table.from_arrays([pa.array([1]), pa.array([2]), pa.array(["a"])], names=["id", "id", "tag_string"])
    pa.parquet.write_table(table, tmp_path / "d.parquet")
    with pytest.raises(DataError, match=r"d\.parquet: it has more than one column id.*each column once"):
        build(tmp_path / "c", CatalogSource(path=tmp_path / "d.parquet"))


@pytest.mark.parametrize(("ids", "why"), [([1.0, 2.5], "no whole number"), ([1, 2**63], "no whole number")])
def test_a_number_that_is_no_id_is_told_as_such(tmp_path: Path, ids: list[Any], why: str) -> None:
    kind = pa.uint64() if isinstance(ids[0], int) else pa.float64()
    ref = build(tmp_path / "c", write(tmp_path / "d.parquet", {"id": pa.array(ids, kind), "tag_string": ["a", "b"]}))
    (row,) = read_rejected(ref.rejected)
    assert (row.key, row.reason) == ("d.parquet row 1", "bad_key") and why in row.detail and str(ids[1]) in row.detail


def test_an_id_in_two_files_is_told_and_pictures_join_by_key(tmp_path: Path) -> None:
    (tmp_path / "meta" / "deep").mkdir(parents=True)
    write(tmp_path / "meta" / "a.parquet", {"id": [1, 2], "tag_string": ["first", "b"]})
    write(tmp_path / "meta" / "deep" / "b.parquet", {"id": [2, 3], "tag_string": ["other", "c"]})
    (tmp_path / "pix").mkdir()
    for number in (2, 3, 4):
        (tmp_path / "pix" / f"{number}.webp").write_bytes(b"p")
    ref = build_catalog(
        CatalogConfig(
            sources=(CatalogSource(path=tmp_path / "pix"), CatalogSource(path=tmp_path / "meta")), out=tmp_path / "c"
        )
    )
    found = told(ref)
    assert {key: row["tags"] for key, row in found.items()} == {
        "2": [("", "b")], "3": [("", "c")], "4": None, "1": [("", "first")],
    }  # fmt: skip
    assert reasons(ref) == {"2": "duplicate_key"}
    assert (ref.missing["image"], ref.missing["tags"], ref.num_seen) == (1, 1, 7)


def test_no_such_file_is_told(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"none\.parquet: does not exist"):
        build(tmp_path / "c", CatalogSource(path=tmp_path / "none.parquet"))
    (tmp_path / "empty").mkdir()
    with pytest.raises(ConfigError, match=r"empty: no \.parquet file"):
        build(tmp_path / "c", CatalogSource(path=tmp_path / "empty", kind="parquet"))


def test_rows_left_out_by_rating_are_said(tmp_path: Path) -> None:
    source = write(tmp_path / "d.parquet", {"id": [1, 2, 3], "rating": ["g", "e", None], "tag_string": ["a"] * 3})
    assert "1 picture of 3 rows" in (
        line := describe(build(tmp_path / "c", source.model_copy(update={"ratings": ("g",)})))
    )
    assert "2 of other ratings" in line


@settings(deadline=None)
@given(sizes=st.lists(st.integers(0, 200_000), max_size=8))
def test_pieces_cover_every_row_once_and_are_small(sizes: Sequence[int]) -> None:
    found = list(parquet.ranges(sizes))
    assert all(0 < stop - start <= parquet.PART_ROWS for start, stop in found)
    assert np.concatenate([np.arange(*piece) for piece in found] or [[]]).tolist() == list(range(sum(sizes)))


def test_a_large_row_group_is_decoded_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = 5_000
    source = write(tmp_path / "d.parquet", {"id": list(range(rows)), "tag_string": [f"t{n % 50}" for n in range(rows)]})
    monkeypatch.setattr(parquet, "PART_ROWS", 100)
    monkeypatch.setattr(parquet, "BATCH", 50)
    read = []
    original = parquet._Stream.next
    monkeypatch.setattr(
        parquet._Stream, "next", lambda stream, limit: read.append(batch := original(stream, limit)) or batch
    )
    config = CatalogConfig(sources=(source,), out=tmp_path / "c", processes=1)
    assert len(plan_catalog(config)) == 50
    build_catalog(config)
    assert sum(batch.num_rows for batch in read) == rows


def test_the_made_up_dump_is_read_whole(tmp_path: Path) -> None:
    write_dump(tmp_path / "d.parquet", 3_000, row_group_size=1_000)
    rows = [row for table in danbooru_tables(3_000) for row in table.to_pylist()]
    found = told(build(tmp_path / "c", CatalogSource(path=tmp_path / "d.parquet"), processes=2))
    assert list(found) == [str(row["id"]) for row in rows]
    for row in rows:
        names = ("artist", "character", "copyright", "general", "meta")
        expected = [(name, tag) for name in names for tag in row[f"tag_string_{name}"].split()]
        assert found[str(row["id"])]["tags"] == expected
