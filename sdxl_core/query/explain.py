"""What a query will find, term by term, before anything is done with it."""

from __future__ import annotations

import math
from dataclasses import dataclass

from sdxl_core.catalog.records import Catalog
from sdxl_core.catalog.schema import RATINGS
from sdxl_core.catalog.sizes import has_unread_sizes
from sdxl_core.query.expressions import (
    And,
    Everything,
    Expression,
    Not,
    Or,
    Query,
    Range,
    Rating,
    Tag,
    Values,
    Wildcard,
    asks_for_size,
)
from sdxl_core.query.index import Index
from sdxl_core.query.names import TagNames
from sdxl_core.query.select import Conditions, Ints, evaluate, scan

NOT_TOLD = "no source tells it: facts come from parquet, JSON or JSONL, see docs/catalog_sources.md"
SIZES_SKIPPED = "sizes are not read from pictures: the catalog was made with --sizes skip; make it with --sizes auto"
SIZES_NOT_READ = "sizes are read only of pictures that the rest of the query finds"


@dataclass(frozen=True, slots=True)
class Explained:
    """A term or a group of terms. `depth`: how deep it is nested.   `note`: what is odd about it, "" for nothing.

    `num_unknown`: records of which the number or the rating that it asks for is not known; a term finds none of them.
    """

    text: str
    depth: int
    num_records: int
    num_unknown: int
    note: str


def explain(catalog: Catalog, query: Query, index: Index | None = None) -> list[Explained]:
    """Count every term and group of a query: the whole first, then its parts, each below what it belongs to."""
    nested = _nested(query.where, 0)
    known = [_known(expression) for expression, _ in nested]
    counts = _counts(catalog, [*(expression for expression, _ in nested), *known], index)
    names = index.names if index is not None else TagNames.of(catalog.vocabulary)
    are_unread = any(asks_for_size(expression) for expression, _ in nested) and has_unread_sizes(catalog)
    sizes_note = (SIZES_SKIPPED if catalog.sizes == "skip" else SIZES_NOT_READ) if are_unread else ""
    return [
        Explained(
            _text(query, expression),
            depth,
            counts[place],
            num_unknown := catalog.num_records - counts[len(nested) + place],
            (sizes_note if num_unknown and asks_for_size(expression) else "")
            or (NOT_TOLD if num_unknown == catalog.num_records else note_on(expression, names)),
        )
        for place, (expression, depth) in enumerate(nested)
    ]


def note_on(expression: Expression, names: TagNames) -> str:
    """Why a tag or a pattern finds nothing, or how many tags a pattern covers."""
    if isinstance(expression, Wildcard):
        covered = len(names.places_of(expression))
        return f"covers {covered:,} tags" if covered else f"no tag looks like {expression.pattern}"
    if not isinstance(expression, Tag) or len(names.ids_of(expression)):
        return ""
    near = ", ".join(f"{name} ({count:,})" for name, count in names.near(expression.name))
    return f"no picture has {expression.name}" + (f"; did you mean {near}?" if near else "")


def explained_text(explained: list[Explained], num_records: int) -> str:
    """The counts as lines for a terminal."""
    lines = [f"{num_records:>12,}  pictures in the catalog"]
    for part in explained:
        note = f"   <- {part.note}" if part.note else ""
        unknown = f" ({part.num_unknown:,} unknown)" if part.num_unknown else ""
        lines.append(f"{part.num_records:>12,}  {'  ' * part.depth}{part.text}{unknown}{note}")
    return "\n".join(lines)


def _counts(catalog: Catalog, expressions: list[Expression], index: Index | None) -> list[int]:
    """Args:   expressions: one or more, each with all its parts as `_nested` lists them."""
    counts = [0] * len(expressions)
    chunks = [index] if index is not None else (conditions for _, conditions in scan(catalog, expressions))
    for conditions in chunks:
        place = 0
        while place < len(expressions):
            _, place = _count(expressions, place, conditions, counts)
    return counts


def _known(expression: Expression) -> Expression:
    """What is true for the records that a term can be answered for."""
    if isinstance(expression, Range | Values):
        return Range(expression.number, -math.inf, None)
    if isinstance(expression, Rating):
        return Rating(tuple(range(1, len(RATINGS))))
    return Everything()


def _count(expressions: list[Expression], place: int, conditions: Conditions, counts: list[int]) -> tuple[Ints, int]:
    """Add to the counts of the expression at `place` and of all its parts, each looked at once.

    Returns: its mask, and the place behind its parts.
    """
    expression, following = expressions[place], place + 1
    if isinstance(expression, Not):
        mask, following = _count(expressions, following, conditions, counts)
        mask = ~mask
    elif isinstance(expression, And | Or):
        mask, following = _count(expressions, following, conditions, counts)
        for _ in expression.parts[1:]:
            other, following = _count(expressions, following, conditions, counts)
            mask = mask & other if isinstance(expression, And) else mask | other
    else:
        mask = evaluate(expression, conditions)
    counts[place] += conditions.count(mask)
    return mask, following


def _nested(expression: Expression, depth: int) -> list[tuple[Expression, int]]:
    found = [(expression, depth)]
    if isinstance(expression, Not):
        found += _nested(expression.part, depth + 1)
    elif isinstance(expression, And | Or):
        for part in expression.parts:
            found += _nested(part, depth + 1)
    return found


def _text(query: Query, expression: Expression) -> str:
    if isinstance(expression, Everything):
        return "(everything)"
    if isinstance(expression, Or) and all(query.text[part.start - 1 : part.start] == "~" for part in expression.parts):
        return " ".join(f"~{_text(query, part)}" for part in expression.parts)  # other terms may stand between
    return query.text[expression.start : expression.stop]
