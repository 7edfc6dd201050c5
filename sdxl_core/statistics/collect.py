"""Statistics of a catalog, or of some of its records, in one pass and bounded memory."""

from __future__ import annotations

import math
import os
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial, reduce
from itertools import pairwise
from operator import add
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa

from sdxl_core.catalog.records import Catalog
from sdxl_core.catalog.schema import CATEGORIES, RATINGS
from sdxl_core.dataset import forked
from sdxl_core.errors import DataError
from sdxl_core.progress import Progress, no_progress
from sdxl_core.statistics.sums import (
    ASPECTS,
    COLUMNS,
    LACKING,
    MAX_TOKENS,
    MEGAPIXELS,
    TEXTS,
    Sums,
    sums_of,
)
from sdxl_core.statistics.tokens import TagLengths

Ints = np.ndarray[Any, np.dtype[Any]]
RANGE = 65_536
NUM_TAGS = 40  # of each table
NUM_SIZES = 25
# A tag is listed beside a query's tag if so many of the records have both, and so many times the expected number,
MIN_SHARE, MIN_TOGETHER, MIN_LIFT = 0.01, 5, 1.2
MIN_DEVIATIONS = 4.0  # and if chance does not explain it: standard deviations of a Poisson count


class TagCount(NamedTuple):
    """`num_records`: that have the tag."""

    tag: str
    category: str
    num_records: int


class Together(NamedTuple):
    """A tag met beside a query's tag. `share`: of the records with that tag; `lift`: share / share in the catalog."""

    tag: str
    category: str
    num_records: int
    share: float
    lift: float


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenLengths:
    """Lengths of one kind of text. `counts[n]`: texts of n tokens; the last one: of that many or more."""

    num_texts: int
    mean: float
    median: int
    longest: int
    over: dict[int, int]
    counts: tuple[int, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class CatalogStatistics:
    """What the records are made of. Dictionaries are in the order to show them in.

    `tags`: by category, the most frequent.   `tag_totals`: by category, different tags and uses.   `together`: by tag
    of the query, what stands beside it, the most telling first.   `aspects`: width : height, the nearest of the names.
    `tokens`: of tags, caption, and both, as they are trained on.   `lacking`: records without image, tags, caption,
    text (neither), size, rating.
    """

    catalog: str
    catalog_digest: str
    query: str
    num_records: int
    num_in_catalog: int
    tags: dict[str, tuple[TagCount, ...]]
    tag_totals: dict[str, tuple[int, int]]
    together: dict[str, tuple[Together, ...]]
    tags_a_record: tuple[int, ...]
    num_sizes: int
    sizes: dict[str, int]
    aspects: dict[str, int]
    megapixels: dict[str, int]
    ratings: dict[str, int]
    tokens: dict[str, TokenLengths]
    lacking: dict[str, int]


def collect_statistics(
    catalog: Catalog,
    records: Ints | None = None,
    *,
    query: str = "",
    query_tags: Mapping[str, Ints] | None = None,
    processes: int = 0,
    progress: Progress = no_progress,
) -> CatalogStatistics:
    """Look at each record once. A process holds a range of records, and of the vocabulary about 40 bytes a tag, for
    each tag of the query 24 more.

    Args:   records: int64, each once; None: all.   query: what picked them, for the headline.   query_tags: the tags
            of the query, by name all their ids, whose company is wanted.   processes: 0: one a core.
    Raises: DataError: no record.
    """
    names = dict(query_tags or {})
    total = catalog.num_records if records is None else len(records)
    if not total:
        raise DataError(f"{catalog.path}: no picture{f' matches {query!r}' if query else ''}, so nothing to count.")
    starts = list(range(0, total, RANGE))
    work = partial(
        _sums,
        catalog=catalog,
        records=records,
        lengths=TagLengths(catalog.vocabulary["tag"]),
        query_tags=list(names.values()),
    )
    count = forked.num_processes(min(processes or len(os.sched_getaffinity(0)), len(starts)))

    def parts() -> Iterator[Sums]:
        for number, part in enumerate(forked.map_forked(work, starts, count=count)):
            progress("statistics", min(total, starts[number] + RANGE), total)
            yield part

    return _told(catalog, reduce(add, parts()), query=query, query_tags=names)


def _sums(start: int, *, catalog: Catalog, records: Ints | None, lengths: TagLengths, query_tags: list[Ints]) -> Sums:
    stop = start + RANGE
    tables: Iterable[pa.RecordBatch]
    if records is None:
        tables = (chunk.table for chunk in catalog.chunks(COLUMNS, start=start, stop=stop))
    else:
        tables = [catalog.take(records[start:stop], COLUMNS)]
    num_tags = len(catalog.vocabulary)
    sums = reduce(add, (sums_of(table, lengths, num_tags=num_tags, query_tags=query_tags) for table in tables))
    catalog.forget()
    return sums


def _told(catalog: Catalog, sums: Sums, *, query: str, query_tags: Mapping[str, Ints]) -> CatalogStatistics:
    categories = catalog.vocabulary["category"].to_numpy()
    used = [code for code in range(len(CATEGORIES)) if sums.tags[categories == code].any()]
    used.sort(key=lambda code: -sums.tags[categories == code].sum())
    by_frequency = np.argsort(-sums.size_counts, kind="stable")[:NUM_SIZES]
    sizes = {
        f"{size >> 32} x {size & 0xFFFFFFFF}": count
        for size, count in zip(sums.sizes[by_frequency].tolist(), sums.size_counts[by_frequency].tolist(), strict=True)
    }
    bounds = [f"{bound:g}" for bound in MEGAPIXELS]
    classes = [f"under {bounds[0]}", *map(" to ".join, pairwise(bounds)), f"{bounds[-1]} or more"]
    return CatalogStatistics(
        catalog=str(catalog.path),
        catalog_digest=catalog.digest,
        query=query,
        num_records=sums.num_records,
        num_in_catalog=catalog.num_records,
        tags={category_name(code): _top(catalog, sums.tags, categories == code) for code in used},
        tag_totals={
            category_name(code): (
                int((sums.tags[categories == code] > 0).sum()),
                int(sums.tags[categories == code].sum()),
            )
            for code in used
        },
        together={
            name: _company(catalog, counts, having=int(having), own=own)
            for (name, own), counts, having in zip(query_tags.items(), sums.together, sums.having, strict=True)
            if having
        },
        tags_a_record=tuple(sums.tags_a_record.tolist()),
        num_sizes=len(sums.sizes),
        sizes=sizes,
        aspects={name: number for (name, _), number in zip(ASPECTS, sums.aspects.tolist(), strict=True)},
        megapixels=dict(zip(classes, sums.megapixels.tolist(), strict=True)),
        ratings={RATINGS[code] or "unknown": int(sums.ratings[code]) for code in (1, 2, 3, 4, 0)},
        tokens={
            name: _lengths(counts, int(total))
            for name, counts, total in zip(TEXTS, sums.tokens, sums.token_sums, strict=True)
            if counts.any()
        },
        lacking=dict(zip(LACKING, sums.lacking.tolist(), strict=True)),
    )


def category_name(code: int) -> str:
    return CATEGORIES[code] or "no category"


def _top(catalog: Catalog, counts: Ints, chosen: Ints) -> tuple[TagCount, ...]:
    counts = np.where(chosen, counts, 0)
    ids = np.argsort(-counts, kind="stable")[:NUM_TAGS]
    ids = ids[counts[ids] > 0]
    return tuple(TagCount(*told, int(counts[i])) for i, told in zip(ids, _tags(catalog, ids), strict=True))


def _company(catalog: Catalog, counts: Ints, *, having: int, own: Ints) -> tuple[Together, ...]:
    """Tags more frequent beside the query's than elsewhere, ordered by count * log(lift)."""
    counts = counts.copy()
    counts[own] = 0
    expected = catalog.vocabulary["count"].to_numpy() * (having / catalog.num_records)
    telling = (counts >= max(MIN_TOGETHER, MIN_SHARE * having)) & (counts > expected * MIN_LIFT)
    telling &= counts - expected > MIN_DEVIATIONS * np.sqrt(expected)
    ids = np.flatnonzero(telling)
    lift = counts[ids] / expected[ids]
    order = np.argsort(-counts[ids] * np.log(lift), kind="stable")[:NUM_TAGS]
    return tuple(
        Together(*told, int(counts[i]), float(counts[i] / having), float(of))
        for i, of, told in zip(ids[order], lift[order], _tags(catalog, ids[order]), strict=True)
    )


def _tags(catalog: Catalog, ids: Ints) -> list[tuple[str, str]]:
    rows = catalog.vocabulary.take(pa.array(ids)).to_pydict()
    return [(tag, category_name(code)) for tag, code in zip(rows["tag"], rows["category"], strict=True)]


def _lengths(counts: Ints, total: int) -> TokenLengths:
    num_texts = int(counts.sum())
    return TokenLengths(
        num_texts=num_texts,
        mean=total / num_texts,
        median=int(np.searchsorted(np.cumsum(counts), math.ceil(num_texts / 2))),
        longest=min(int(np.flatnonzero(counts)[-1]), MAX_TOKENS),
        over={limit: int(counts[limit + 1 :].sum()) for limit in (75, 150, 225)},
        counts=tuple(counts.tolist()),
    )
