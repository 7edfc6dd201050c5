"""What a query finds: a naive evaluator, one row at a time, is the expected value; scan and index agree with it."""

import fnmatch
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from support.rows import catalog_of

from sdxl_core.catalog.records import Catalog
from sdxl_core.dataset.text import normalise_tag
from sdxl_core.errors import ConfigError
from sdxl_core.query.explain import explain
from sdxl_core.query.expressions import (
    And,
    Everything,
    Expression,
    FileType,
    Has,
    Not,
    Or,
    Query,
    Range,
    Rating,
    Source,
    Tag,
    Values,
    Wildcard,
    asks_for_size,
    walk,
    whatever_sizes,
)  # fmt: skip
from sdxl_core.query.grammar import parse
from sdxl_core.query.index import build_index
from sdxl_core.query.select import _mixed, narrowed, select_by_scan

TAGS = ["1girl", "long hair", "long_hair", "astolfo_(fate)", "astolfo", ":(", "Éclair", "fox_ears", "cat_ears", "a*b"]
CATEGORIES = st.sampled_from(["", "general", "character"])

row = st.fixed_dictionaries(
    {
        "tags": st.none() | st.dictionaries(CATEGORIES, st.lists(st.sampled_from([*TAGS, "re:zero"]))),
        "image": st.sampled_from([None, "x/1.png", "1.WEBP", "noending"]),
        "caption": st.none() | st.just("words"),
        "id": st.none() | st.integers(0, 12),
        "score": st.none() | st.integers(-3, 12),
        "fav_count": st.none() | st.integers(0, 3),
        "width": st.none() | st.sampled_from([500, 1000, 1600]),
        "height": st.none() | st.sampled_from([500, 900, 1000]),
        "rating": st.none() | st.integers(1, 4),
        "num_bytes": st.none() | st.sampled_from([100, 2048, 2**20]),
    }
)
signs = st.sampled_from(["", ">=", ">", "<=", "<"])
ranges = st.builds("{}{}".format, signs, st.integers(-1, 10)) | st.sampled_from(["1..10", "..3", "3..", "1,3,10"])
WORDS = """
1girl long_hair "long hair" astolfo_(fate) astolfo :( éclair nobody re:zero "a*b"
*_ears astolfo* * *hair* f*_e*s A*B *o*o* *x_*_ears *astolfo astolfo*astolfo
width:>=1000 height:500..900 mpixels:1 mpixels:>1.2 ratio:1.78 ratio:16:9 ratio:<1 filesize:>1kb filesize:..2kb
rating:g,s rating:e filetype:png filetype:webp,png has:tags has:caption has:image source:a source:a,b source:a/b
"""
words = st.sampled_from(WORDS.replace("long hair", "long\0hair").split()).map(lambda word: word.replace("\0", " "))
plain = words | st.builds("{}:{}".format, st.sampled_from(["id", "score", "favcount", "tagcount"]), ranges)
terms = st.recursive(
    plain,
    lambda inner: (
        st.builds("{} {}".format, inner, inner)
        | st.builds("( {} or {} )".format, inner, inner)
        | st.builds("-( {} )".format, inner)
        | st.builds("( ~{} ~{} and {} )".format, plain, plain, inner)
    ),
    max_leaves=5,
)
queries = terms | st.builds("-{}".format, plain) | st.just("")


def truth(expression: Expression, row: dict[str, Any]) -> bool:
    """The meaning of an expression for one row."""
    tags = {normalise_tag(tag) for tags in (row["tags"] or {}).values() for tag in tags}
    match expression:
        case Everything():
            return True
        case Not(part=part):
            return not truth(part, row)
        case And(parts=parts):
            return all(truth(part, row) for part in parts)
        case Or(parts=parts):
            return any(truth(part, row) for part in parts)
        case Tag(name=name):
            return name in tags
        case Wildcard(pattern=pattern):
            return any(fnmatch.fnmatchcase(tag, pattern.replace("[", "[[]")) for tag in tags)
        case Rating(codes=codes):
            return row["rating"] in codes
        case FileType(endings=endings):
            return row["image"] is not None and any(row["image"].lower().endswith(f".{ending}") for ending in endings)
        case Source(prefixes=prefixes):
            return row["key"].startswith(prefixes)
        case Has(what=what):
            return row[what] is not None
        case Range() | Values():
            return number_is(expression, row)
    raise AssertionError(expression)


def number_is(condition: Range | Values, row: dict[str, Any]) -> bool:
    width, height = row["width"], row["height"]
    shaped = width is not None and height is not None
    distinct = {(category, tag) for category, tags in (row["tags"] or {}).items() for tag in tags}
    number = {
        "favcount": lambda: row["fav_count"],
        "filesize": lambda: row["num_bytes"],
        "mpixels": lambda: width * height / 1e6 if shaped else None,
        "ratio": lambda: width / height if shaped else None,
        "tagcount": lambda: None if row["tags"] is None else len(distinct),
    }.get(condition.number, lambda: row[condition.number])()
    if number is None:
        return False
    rounded = condition.number in ("mpixels", "ratio")
    if isinstance(condition, Values):
        return any(round(number, 2) == round(value, 2) if rounded else number == value for value in condition.values)
    if rounded and condition.low is not None and condition.low == condition.high:
        return round(number, 2) == round(condition.low, 2)
    above = condition.low is None or number > condition.low or (condition.low_included and number == condition.low)
    below = condition.high is None or number < condition.high or (condition.high_included and number == condition.high)
    return above and below


@pytest.fixture(scope="module", autouse=True)
def no_wait_for_the_disk() -> Iterator[None]:
    """Catalogs and indexes by the hundred: what is not asked here is whether they outlive a power cut."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", lambda handle: None)
        yield


@settings(max_examples=250, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    rows=st.lists(row, min_size=1, max_size=40),
    texts=st.lists(queries, min_size=1, max_size=4),
    part_rows=st.integers(1, 50),
)
def test_scan_and_index_find_what_the_naive_evaluator_finds(
    tmp_path_factory: pytest.TempPathFactory, rows: list[dict[str, Any]], texts: list[str], part_rows: int
) -> None:
    rows = [{**row, "key": f"{'ab'[number % 2]}/{'b/' * (number % 3 == 0)}{number}"} for number, row in enumerate(rows)]
    rows[0]["tags"] = rows[0]["tags"] or {"": []}
    for row in rows:  # lists are empty where a row says nothing of a category that others have
        if row["tags"] is not None:
            row["tags"].setdefault("", [])
    catalog = catalog_of(tmp_path_factory.mktemp("query"), [rows], part_rows=part_rows)
    index = build_index(catalog)
    for text in texts:
        try:
            query = parse(text)
        except ConfigError as error:
            assert "both wanted and unwanted" in str(error)
            continue
        expected = [number for number, row in enumerate(rows) if truth(query.where, row)]
        hoped_for = whatever_sizes(query.where)
        assert not any(map(asks_for_size, walk(hoped_for)))
        assert all(truth(hoped_for, rows[number]) for number in expected), "no picture is passed over unread"
        assert select_by_scan(catalog, query).records.tolist() == expected, text
        assert index.select(query).records.tolist() == expected, text
        for explained in (explain(catalog, query), explain(catalog, query, index)):
            assert explained[0].num_records == len(expected)
            parts = list(walk(query.where))
            assert [part.num_records for part in explained] == [sum(truth(part, row) for row in rows) for part in parts]


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    sources=st.lists(
        st.lists(
            st.tuples(st.integers(0, 30), st.none() | st.lists(st.sampled_from("abcde"))), min_size=1, max_size=60
        ),
        min_size=2,
        max_size=3,
    ),
    part_rows=st.integers(1, 50),
)
def test_pictures_that_several_sources_describe_are_found_by_the_tags_that_count(
    tmp_path_factory: pytest.TempPathFactory, sources: list[list[tuple[int, list[str] | None]]], part_rows: int
) -> None:
    told: dict[int, list[str] | None] = {}  # the first row that has tags counts
    for key, tags in (row for source in sources for row in source):
        told[key] = tags if told.get(key) is None else told[key]
    rows = [[{"key": str(k), "tags": None if t is None else {"": t}} for k, t in source] for source in sources]
    catalog = catalog_of(tmp_path_factory.mktemp("several"), rows, part_rows=part_rows)
    keys = np.array([int(key) for chunk in catalog.chunks(["key"]) for key in chunk.table["key"].to_pylist()])
    sides = {"width": None, "height": None}
    rows_told = {key: {"tags": None if tags is None else {"": tags}, **sides} for key, tags in told.items()}
    for text in ("a", "a -b", "b or ( c d )", "*", "-has:tags", "tagcount:>1"):
        query = parse(text)
        expected = [key for key in keys.tolist() if truth(query.where, rows_told[key])]
        assert keys[select_by_scan(catalog, query).records].tolist() == expected, text
        assert keys[build_index(catalog).select(query).records].tolist() == expected, text


@pytest.fixture(scope="module")
def catalog(tmp_path_factory: pytest.TempPathFactory) -> Catalog:
    rows = [
        {
            "key": str(n),
            "id": n,
            "tags": {
                "general": [f"t{n % 7}", "all", f"odd_{n}" if n % 2 else f"even_{n}", f"own_{n}"],
                "artist": [f"artist_{n % 400}"],
            },
            "score": n % 50,
        }
        for n in range(2_000)
    ]
    return catalog_of(tmp_path_factory.mktemp("many"), [rows], part_rows=300)


def test_limit_takes_the_first(catalog: Catalog) -> None:
    assert select_by_scan(catalog, parse("t3 limit:4")).records.tolist() == [3, 10, 17, 24]
    assert select_by_scan(catalog, parse("t3 limit:4")).num_matched == 286


def test_a_random_draw_depends_on_seed_and_keys_only(catalog: Catalog, tmp_path: Path) -> None:
    drawn = select_by_scan(catalog, parse("t3 random:40 seed:5")).records
    assert len(drawn) == 40 and (np.diff(drawn) > 0).all() and set(drawn % 7) == {3}
    rows = [{"key": str(n), "tags": {"": [f"t{n % 7}"]}} for n in reversed(range(2_000))]
    backwards = catalog_of(tmp_path, [rows])
    again = select_by_scan(backwards, parse("t3 random:40 seed:5")).records
    assert sorted(1_999 - again) == drawn.tolist()
    assert select_by_scan(catalog, parse("t3 random:40 seed:6")).records.tolist() != drawn.tolist()
    assert set(drawn) <= set(select_by_scan(catalog, parse("t3 random:80 seed:5")).records), (
        "a larger draw has the smaller"
    )


@settings(deadline=None)
@given(
    values=st.lists(st.integers(0, 2**64 - 1) | st.sampled_from([0, 7, 2**64 - 1]), min_size=1, max_size=300),
    repeated=st.integers(1, 9),
    share=st.floats(0, 0.999),
    seed=st.integers(0, 2**63 - 1),
)
def test_a_draw_takes_the_lowest_of_all_however_keys_are_spread(
    values: list[int], repeated: int, share: float, seed: int
) -> None:
    hashes = np.tile(np.asarray(values, np.uint64), repeated)
    records = np.arange(len(hashes)) * 3 + 5
    count = int(share * len(records))
    found = narrowed(Query("", Everything(), random=count, seed=seed), records, lambda some: hashes[(some - 5) // 3])
    order = np.argsort(_mixed(hashes, seed), kind="stable")[:count]
    assert found.records.tolist() == sorted(records[order].tolist()) and found.num_matched == len(records)


def test_many_terms_at_once_are_told_apart(catalog: Catalog) -> None:
    text = " or ".join(f"artist_{number}" for number in range(0, 400, 4))
    expected = [number for number in range(2_000) if number % 400 % 4 == 0]
    assert select_by_scan(catalog, parse(text)).records.tolist() == expected
    assert build_index(catalog).select(parse(text)).records.tolist() == expected


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("odd_* or own_1", range(1, 2_000, 2)),
        ("own_*", range(2_000)),
        ("*", range(2_000)),
        ("own_1* own_*5", [n for n in range(2_000) if str(n)[0] == "1" and n % 10 == 5]),
    ],
)
def test_a_wildcard_over_thousands_of_tags_finds_all_their_pictures(
    catalog: Catalog, text: str, expected: Sequence[int]
) -> None:
    expected = list(expected)
    assert select_by_scan(catalog, parse(text)).records.tolist() == expected
    assert build_index(catalog).select(parse(text)).records.tolist() == expected


def test_an_unknown_tag_suggests_near_ones_with_their_counts(catalog: Catalog) -> None:
    notes = {part.text: part.note for part in explain(catalog, parse("artst_12 all"))}
    assert "did you mean artist_12 (5)" in notes["artst_12"]
    assert notes["all"] == ""
    assert "artist_1 (5)" in {part.text: part.note for part in explain(catalog, parse("artist"))}["artist"]
