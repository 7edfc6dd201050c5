"""The statistics stage: what a query picks of a catalog, as a page and tables; its flow shows the tables."""

from pathlib import Path

import pytest

from sdxl_core.catalog.build import build_catalog
from sdxl_core.catalog.config import CatalogConfig, CatalogSource
from sdxl_core.config import StatisticsConfig
from sdxl_core.errors import ConfigError, DataError
from sdxl_core.statistics.stage import statistics


@pytest.fixture
def catalog(tmp_path: Path) -> Path:
    (tmp_path / "in").mkdir()
    for number in range(40):
        (tmp_path / "in" / f"{number}.png").write_bytes(b"x")
        tags = ["1girl"] + ["Astolfo (Fate)", "pink hair"] * (number % 4 == 0)
        (tmp_path / "in" / f"{number}.txt").write_text(", ".join(tags))
    build_catalog(CatalogConfig(sources=(CatalogSource(path=tmp_path / "in"),), out=tmp_path / "catalog", processes=1))
    return tmp_path / "catalog"


def test_a_query_is_answered_with_what_stands_beside_its_tags(catalog: Path) -> None:
    config = StatisticsConfig(source=catalog, query="astolfo_(fate) -comic", out=catalog.parent / "out")
    ref = statistics(config)
    assert (ref.num_kept, ref.num_seen) == (10, 40)
    tables = ref.tables.read_text()
    assert "### Beside astolfo\\_(fate)" in tables and "| pink hair | 10 | 100.0% | 4.0 |" in tables
    assert "Beside 1girl" not in tables
    before = ref.path.stat().st_ino, ref.tables.stat().st_ino
    assert statistics(config) == ref and (ref.path.stat().st_ino, ref.tables.stat().st_ino) == before


def test_no_query_takes_every_picture(catalog: Path) -> None:
    assert statistics(StatisticsConfig(source=catalog, out=catalog.parent / "out")).num_kept == 40


def test_nothing_to_count_is_told(catalog: Path) -> None:
    with pytest.raises(DataError, match="no picture matches 'comic'"):
        statistics(StatisticsConfig(source=catalog, query="comic", out=catalog.parent / "out"))
    with pytest.raises(ConfigError, match="not a catalog"):
        statistics(StatisticsConfig(source=catalog.parent / "in", out=catalog.parent / "out"))


def test_what_nobody_knows_has_no_table(catalog: Path) -> None:
    """A folder tells neither ratings nor sizes: page and tables leave them out; a source that does brings them back."""
    ref = statistics(StatisticsConfig(source=catalog, out=catalog.parent / "out"))
    unknown, known = ("Ratings", "Aspect ratios", "Megapixels", "izes"), ("## What is missing", "## Tags")
    text, page = ref.tables.read_text(), ref.path.read_text()
    assert all(f"## {title}" not in text and f"<h2>{title}" not in page for title in unknown)
    assert "Most frequent sizes" not in text and "| size unknown | 40 | 100.0% |" in text
    assert all(title in text for title in known)
    facts = catalog.parent / "facts.jsonl"
    facts.write_text('{"key": "1", "width": 300, "height": 200, "rating": "q"}')
    sources = (CatalogSource(path=catalog.parent / "in"), CatalogSource(path=facts))
    build_catalog(CatalogConfig(sources=sources, out=catalog, processes=1))
    text = statistics(StatisticsConfig(source=catalog, out=catalog.parent / "out")).tables.read_text()
    assert "| questionable | 1 | 2.5% |" in text and "## Megapixels" in text and "| 300 x 200 | 1 |" in text
