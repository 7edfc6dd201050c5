"""statistics.html: the statistics on one page that needs nothing beside it."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from html import escape
from pathlib import Path

from sdxl_core.files import write_atomic
from sdxl_core.report.charts import bar_chart, column_chart
from sdxl_core.report.page import STYLE
from sdxl_core.statistics.collect import CatalogStatistics, TagCount, TokenLengths
from sdxl_core.statistics.tables import (
    LIMITS,
    TEXT_NAMES,
    headline,
    knows_ratings,
    lacking_rows,
    rating_names,
    token_rows,
)

TABLE_STYLE = """
td:not(:first-child), th:not(:first-child) { text-align: right; }
svg { width: 100%; } details { margin: 8px 0; } summary { cursor: pointer; } h3 { font-size: 16px; margin: 24px 0 8px; }
"""
NUM_BARS = 25  # the rest of a table is folded away
MAX_COLUMNS = 80
LABEL_PX = 220


def write_page(statistics: CatalogStatistics, path: Path) -> Path:
    """Write the page; an unchanged one is not written again. Returns its path. Raises: DiskFullError, DataError."""
    parts = [_lacking(statistics), _tokens(statistics), _together(statistics), _tags(statistics), _pictures(statistics)]
    title = f"Statistics of {headline(statistics)}"
    page = (
        f'<!doctype html><html lang="en"><meta charset="utf-8"><title>{escape(title)}</title>'
        f"<style>{STYLE}{TABLE_STYLE}</style><main><h1>{escape(title)}</h1>"
        f'<p class="note">catalog {escape(statistics.catalog)}, state {statistics.catalog_digest[:12]}</p>'
        f"{''.join(parts)}</main></html>"
    ).encode("utf-8", "replace")
    if not path.exists() or path.read_bytes() != page:
        write_atomic(path, page)
    return path


def _lacking(statistics: CatalogStatistics) -> str:
    return f"<h2>What is missing</h2>{_table(('what', 'pictures', 'share'), lacking_rows(statistics))}"


def _tokens(statistics: CatalogStatistics) -> str:
    if not statistics.tokens:
        return ""
    head = ("text", "texts", "mean", "median", "longest", *(f"over {limit}" for limit in LIMITS))
    charts = "".join(
        f"<h3>{escape(TEXT_NAMES[name])}</h3>{_histogram(of)}" for name, of in statistics.tokens.items() if of.longest
    )
    note = (
        "CLIP tokens without begin and end marks; a text over the length that is trained with loses its end. "
        "Dashed: 75, 150 and 225."
    )
    return f'<h2>Lengths in tokens</h2>{_table(head, token_rows(statistics))}<p class="note">{note}</p>{charts}'


def _histogram(of: TokenLengths) -> str:
    step = -(-(of.longest + 1) // MAX_COLUMNS)
    step = next(wide for wide in (1, 2, 3, 5, 10, 15, 25) if wide >= step)
    used = of.counts[: of.longest + 1]
    counts = [sum(used[start : start + step]) for start in range(0, len(used), step)]
    return column_chart(counts, step=step, marks=LIMITS, x_label="tokens", y_label="texts")


def _together(statistics: CatalogStatistics) -> str:
    parts = []
    for name, company in statistics.together.items():
        rows = [
            (row.tag, row.category, f"{row.num_records:,}", f"{row.share:.1%}", f"{row.lift:,.1f} x") for row in company
        ]
        body = _folded(("tag", "category", "pictures", "share", "lift"), rows) if rows else "<p>Nothing stands out.</p>"
        parts.append(f"<h3>{escape(name)}</h3>{body}")
    if not parts:
        return ""
    note = (
        "share: of the pictures here with the query's tag; lift: how many times more frequent than in the whole "
        "catalog. Listed are tags that at least 1% of these pictures have, and more often than chance explains; in the "
        "order of pictures x log(lift): frequent here and rare elsewhere first."
    )
    return f'<h2>What stands beside the tags of the query</h2><p class="note">{note}</p>{"".join(parts)}'


def _tags(statistics: CatalogStatistics) -> str:
    totals = [(name, f"{tags:,}", f"{uses:,}") for name, (tags, uses) in statistics.tag_totals.items()]
    parts = [f"<h2>Tags</h2>{_table(('category', 'different tags', 'uses'), totals)}" if totals else ""]
    used = [number for number, count in enumerate(statistics.tags_a_record) if count]
    if used and used[-1]:
        step = -(-(used[-1] + 1) // MAX_COLUMNS)
        shown = statistics.tags_a_record[: used[-1] + 1]
        counts = [sum(shown[start : start + step]) for start in range(0, len(shown), step)]
        chart = column_chart(counts, step=step, x_label="tags a picture", y_label="pictures")
        parts.append(f"<h3>Tags a picture</h3>{chart}")
    parts += [_frequency(name, tags, statistics.num_records) for name, tags in statistics.tags.items()]
    return "".join(parts)


def _frequency(name: str, tags: Sequence[TagCount], num_records: int) -> str:
    bars = {row.tag: row.num_records for row in tags}
    first, rest = dict(list(bars.items())[:NUM_BARS]), dict(list(bars.items())[NUM_BARS:])
    chart = bar_chart(first, label_px=LABEL_PX, total=num_records)
    more = [(tag, f"{count:,}", f"{count / num_records:.1%}") for tag, count in rest.items()]
    folded = f"<details><summary>{len(more)} more</summary>{_table(('tag', 'pictures', 'share'), more)}</details>"
    return f"<h3>Most frequent: {escape(name)}</h3>{chart}{folded if more else ''}"


def _pictures(statistics: CatalogStatistics) -> str:
    total = statistics.num_records
    parts = []
    if knows_ratings(statistics):
        parts.append(f"<h2>Ratings</h2>{bar_chart(rating_names(statistics), total=total)}")
    if statistics.num_sizes:
        parts += [
            f"<h2>Aspect ratios</h2>{bar_chart(statistics.aspects, total=total)}"
            '<p class="note">width : height, each picture with the nearest of these</p>',
            f"<h2>Megapixels</h2>{bar_chart(statistics.megapixels, total=total)}",
            f"<h2>Sizes</h2>{_sizes(statistics)}",
        ]
    return "".join(parts)


def _sizes(statistics: CatalogStatistics) -> str:
    if max(statistics.sizes.values()) == 1:
        return f'<p class="note">{statistics.num_sizes:,} different sizes, none of them twice</p>'
    note = f'<p class="note">width x height in pixels, the most frequent of {statistics.num_sizes:,}</p>'
    return bar_chart(statistics.sizes, total=statistics.num_records) + note


def _folded(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    more = len(rows) - NUM_BARS
    rest = f"<details><summary>{more} more</summary>{_table(head, rows[NUM_BARS:])}</details>" if more > 0 else ""
    return _table(head, rows[:NUM_BARS]) + rest


def _table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = "".join(f"<tr>{''.join(f'<td>{escape(cell)}</td>' for cell in row)}</tr>" for row in rows)
    return f"<table><tr>{''.join(f'<th>{escape(cell)}</th>' for cell in head)}</tr>{lines}</table>"
