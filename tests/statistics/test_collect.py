"""Statistics are what counting row by row gives, for any choice of records and any number of processes."""

import math
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from support.rows import catalog_of

from sdxl_core.catalog.records import Catalog
from sdxl_core.dataset.tokens import count_tokens
from sdxl_core.errors import DataError
from sdxl_core.statistics import collect as module
from sdxl_core.statistics.collect import CatalogStatistics, collect_statistics
from sdxl_core.statistics.page import write_page
from sdxl_core.statistics.sums import ASPECTS
from sdxl_core.statistics.tables import markdown

sides = st.none() | st.integers(1, 3_000)
row = st.fixed_dictionaries(
    {
        "image": st.none() | st.just("i.png"),
        "width": sides,
        "height": sides,
        "rating": st.none() | st.integers(0, 4),
        "tags": st.none()
        | st.fixed_dictionaries(
            {
                "artist": st.lists(st.sampled_from(["me", "you"]), unique=True),
                "general": st.lists(st.sampled_from("abcdefg"), unique=True),
            }
        ),
        "caption": st.none() | st.sampled_from(["", "A knight.", "word " * 80, "word " * 200]),
    }
)


def ids_of(catalog: Catalog, tag: str) -> np.ndarray[Any, Any]:
    return np.flatnonzero(np.asarray(catalog.vocabulary["tag"]) == tag)


def naive(rows: list[dict[str, Any]]) -> dict[str, Any]:
    tags = [[*row["tags"]["artist"], *row["tags"]["general"]] for row in rows if row["tags"] is not None]
    sized = [(row["width"], row["height"]) for row in rows if row["width"] and row["height"]]
    captions = [count_tokens(row["caption"]) for row in rows if row["caption"] is not None]
    return {
        "tags": Counter(tag for of_row in tags for tag in of_row),
        "tags_a_record": Counter(len(of_row) for of_row in tags),
        "sizes": Counter(f"{width} x {height}" for width, height in sized),
        "aspects": Counter(
            min(ASPECTS, key=lambda named: abs(math.log(named[1]) - math.log(width / height)))[0]
            for width, height in sized
        ),
        "ratings": Counter("?gsqe"[row["rating"] or 0] for row in rows),
        "over": {limit: sum(length > limit for length in captions) for limit in (75, 150, 225)},
        "lacking": {
            "image": sum(row["image"] is None for row in rows),
            "tags": sum(row["tags"] is None for row in rows),
            "caption": sum(row["caption"] is None for row in rows),
            "text": sum(row["caption"] is None and row["tags"] is None for row in rows),
            "size": len(rows) - len(sized),
            "rating": sum(not row["rating"] for row in rows),
        },
    }


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(row, min_size=1, max_size=30), st.randoms(use_true_random=False))
def test_statistics_are_those_of_counting_row_by_row(
    tmp_path_factory: Any, rows: list[dict[str, Any]], rng: Any
) -> None:
    rows = [{"key": str(number), **row} for number, row in enumerate(rows)]
    folder = tmp_path_factory.mktemp("made")
    catalog = catalog_of(folder, [rows], part_rows=7)
    chosen = rng.sample(range(len(rows)), rng.randint(1, len(rows)))
    for records, expected in (
        (None, naive(rows)),
        (np.array(chosen, np.int64), naive([rows[number] for number in chosen])),
    ):
        found = collect_statistics(catalog, records, processes=1)
        assert {tag.tag: tag.num_records for tags in found.tags.values() for tag in tags} == expected["tags"]
        assert +Counter(dict(enumerate(found.tags_a_record))) == expected["tags_a_record"]
        assert found.sizes.items() <= expected["sizes"].items() and found.num_sizes == len(expected["sizes"])
        assert sum(found.aspects.values()) == sum(expected["aspects"].values())
        assert +Counter(found.aspects) == expected["aspects"]
        assert {name[0] if name != "unknown" else "?": n for name, n in found.ratings.items() if n} == expected[
            "ratings"
        ]
        assert found.lacking == expected["lacking"]
        if "caption" in found.tokens:
            assert found.tokens["caption"].over == expected["over"]
        write_page(found, folder / "page.html")


@pytest.fixture
def catalog(tmp_path: Path) -> Catalog:
    """2,000 records: every tenth is astolfo, always with fate, mostly pink-haired; everybody has 1girl."""
    rng = np.random.default_rng(0)
    rows = []
    for number in range(2_000):
        general = ["1girl", *(f"t{n}" for n in sorted(set(rng.integers(0, 50, 20).tolist())))]
        tags = {"general": general}
        if number % 10 == 0:
            tags = {
                "character": ["astolfo"],
                "copyright": ["fate"],
                "general": [*general, "pink_hair"][number % 50 == 0 :],
            }
        elif number % 10 == 1:
            tags = {"character": [], "copyright": ["fate"], "general": general}
        rows.append({"key": str(number), "image": f"{number}.png", "tags": tags, "width": 832, "height": 1216})
    return catalog_of(tmp_path, [rows], part_rows=300)


def collected(catalog: Catalog, **options: Any) -> CatalogStatistics:
    return collect_statistics(catalog, query_tags={"astolfo": ids_of(catalog, "astolfo")}, **options)


def test_what_stands_beside_a_tag_is_ordered_by_what_it_tells(catalog: Catalog) -> None:
    company = {row.tag: row for row in collected(catalog).together["astolfo"]}
    assert list(company)[:2] == ["pink_hair", "fate"]
    assert (company["fate"].num_records, company["fate"].share, company["fate"].lift) == (200, 1.0, 5.0)
    assert company["pink_hair"].lift == pytest.approx(10.0)
    assert "1girl" not in company and "astolfo" not in company


def test_lift_compares_picked_records_with_the_whole_catalog(catalog: Catalog) -> None:
    picked = collected(catalog, records=np.arange(0, 2_000, 10), query="astolfo")
    assert picked.together["astolfo"][1].lift == 5.0
    assert (picked.num_records, picked.num_in_catalog) == (200, 2_000)


def test_processes_and_ranges_do_not_change_the_statistics(catalog: Catalog, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = collected(catalog, processes=1)
    monkeypatch.setattr(module, "RANGE", 170)
    assert collected(catalog, processes=1) == whole
    assert collected(catalog, processes=2) == whole
    records = np.random.default_rng(1).permutation(2_000)
    assert collected(catalog, records=records) == whole


def test_no_record_is_told(catalog: Catalog) -> None:
    with pytest.raises(DataError, match="no picture matches 'nobody'"):
        collect_statistics(catalog, np.zeros(0, np.int64), query="nobody")


def test_the_page_needs_nothing_beside_it_and_shows_odd_tags_as_text(tmp_path: Path) -> None:
    rows = [{"key": "1", "image": "1.png", "tags": {"general": ["<script>alert(1)</script>", "a|b_c"]}, "rating": 1}]
    found = collect_statistics(catalog_of(tmp_path, [rows]), query="<b>")
    page = write_page(found, tmp_path / "statistics.html").read_text()
    assert "<script" not in page and "&lt;script&gt;" in page and "<b>" not in page
    assert "<svg" in page and "<table" in page
    assert "src=" not in page and "href=" not in page and "url(" not in page
    written = (tmp_path / "statistics.html").stat().st_ino
    write_page(found, tmp_path / "statistics.html")
    assert (tmp_path / "statistics.html").stat().st_ino == written
    tables = markdown(found)
    assert "a\\|b\\_c" in tables and "| over 75 |" in tables
    assert "# Statistics of 1 of 1 pictures that match '\\<b>'" in tables
    columns = {line.replace("\\|", "").count("|") for line in tables.splitlines() if "c | 1 |" in line}
    assert columns == {4}


def test_sizes_that_all_differ_are_counted_not_drawn(tmp_path: Path) -> None:
    rows = [{"key": str(n), "image": "1.png", "width": 600 + n, "height": 800} for n in range(3)]
    write_page(collect_statistics(catalog_of(tmp_path, [rows])), tmp_path / "statistics.html")
    page = (tmp_path / "statistics.html").read_text()
    assert "3 different sizes, none of them twice" in page and "600 x 800" not in page
