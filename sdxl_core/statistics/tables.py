"""Statistics as markdown, for artifacts and terminals."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from sdxl_core.statistics.collect import CatalogStatistics

NUM_ROWS = 20  # of long tables
LIMITS = (75, 150, 225)
TEXT_NAMES = {"tags": "tags", "caption": "captions", "both": "caption, tags"}
LACKING_NAMES = {
    "image": "no picture",
    "tags": "no tags",
    "caption": "no caption",
    "text": "neither tags nor caption",
    "size": "size unknown",
    "rating": "rating unknown",
}
RATING_NAMES = {"g": "general", "s": "sensitive", "q": "questionable", "e": "explicit"}


def markdown(statistics: CatalogStatistics) -> str:
    """All tables of which anything is known, one after the other."""
    parts = [
        f"# Statistics of {_plain(headline(statistics))}",
        "## What is missing",
        table(("what", "pictures", "share"), lacking_rows(statistics)),
    ]
    if statistics.tokens:
        head = ("text", "texts", "mean", "median", "longest", *(f"over {limit}" for limit in LIMITS))
        parts += ["## Lengths in tokens", table(head, token_rows(statistics))]
    if statistics.tag_totals:
        totals = [(name, f"{tags:,}", f"{uses:,}") for name, (tags, uses) in statistics.tag_totals.items()]
        parts += ["## Tags", table(("category", "different tags", "uses"), totals)]
    for name, tags in statistics.tags.items():
        rows = [(row.tag, f"{row.num_records:,}", _share(row.num_records, statistics)) for row in tags[:NUM_ROWS]]
        parts += [f"### Most frequent: {name}", table(("tag", "pictures", "share"), rows)]
    for name, company in statistics.together.items():
        together = [(row.tag, f"{row.num_records:,}", f"{row.share:.1%}", f"{row.lift:.1f}") for row in company]
        parts += [f"### Beside {_plain(name)}", table(("tag", "pictures", "share", "lift"), together[:NUM_ROWS])]
    known: dict[str, dict[str, int]] = {}
    if knows_ratings(statistics):
        known["Ratings"] = rating_names(statistics)
    if statistics.num_sizes:
        known |= {"Aspect ratios": statistics.aspects, "Megapixels": statistics.megapixels}
        known["Most frequent sizes"] = dict(list(statistics.sizes.items())[:NUM_ROWS])
    for title, counts in known.items():
        rows = [(name, f"{count:,}", _share(count, statistics)) for name, count in counts.items()]
        parts += [f"## {title}", table((title.lower(), "pictures", "share"), rows)]
    return "\n\n".join(parts) + "\n"


def headline(statistics: CatalogStatistics) -> str:
    """`1,000 of 5,000 pictures that match 'x'`."""
    if not statistics.query:
        if statistics.num_records == statistics.num_in_catalog:
            return f"{statistics.num_records:,} pictures"
        return f"{statistics.num_records:,} of {statistics.num_in_catalog:,} pictures"
    return f"{statistics.num_records:,} of {statistics.num_in_catalog:,} pictures that match {statistics.query!r}"


def knows_ratings(statistics: CatalogStatistics) -> bool:
    """Whether the rating of any picture is known."""
    return statistics.lacking["rating"] < statistics.num_records


def rating_names(statistics: CatalogStatistics) -> dict[str, int]:
    return {RATING_NAMES.get(name, name): count for name, count in statistics.ratings.items()}


def lacking_rows(statistics: CatalogStatistics) -> list[tuple[str, str, str]]:
    return [
        (LACKING_NAMES[name], f"{count:,}", _share(count, statistics)) for name, count in statistics.lacking.items()
    ]


def token_rows(statistics: CatalogStatistics) -> list[tuple[str, ...]]:
    return [
        (
            TEXT_NAMES[name],
            f"{of.num_texts:,}",
            f"{of.mean:.1f}",
            f"{of.median}",
            f"{of.longest}" + ("+" if of.longest == len(of.counts) - 1 else ""),
            *(f"{count:,} ({count / of.num_texts:.1%})" for count in of.over.values()),
        )
        for name, of in statistics.tokens.items()
    ]


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A markdown table; numbers stand right."""
    lines = [head, [":---", *["---:"] * (len(head) - 1)], *rows]
    return "\n".join("| " + " | ".join(_plain(cell) for cell in line) + " |" for line in lines)


def _plain(cell: str) -> str:
    for sign in "\\`*_|<[":
        cell = cell.replace(sign, f"\\{sign}")
    return cell.replace("\n", " ")


def _share(count: int, statistics: CatalogStatistics) -> str:
    return f"{count / statistics.num_records:.1%}"
