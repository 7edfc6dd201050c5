"""What is added up over records. Sums of parts of a catalog add to the sums of the whole, in any order."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from sdxl_core.catalog.schema import RATINGS
from sdxl_core.statistics.tokens import NONE, TagLengths, record_tokens

Ints = np.ndarray[Any, np.dtype[Any]]
COLUMNS = ("image", "width", "height", "rating", "tags", "raw_tags", "caption")
MAX_TOKENS = 1_024  # longer texts are counted with these
MAX_TAGS = 512
TEXTS = ("tags", "caption", "both")
LACKING = ("image", "tags", "caption", "text", "size", "rating")
MEGAPIXELS = (0.25, 0.5, 1.0, 2.0, 4.0, 8.0, 16.0)  # bounds between the classes
ASPECTS = (
    ("1:3", 1 / 3), ("1:2", 1 / 2), ("9:16", 9 / 16), ("2:3", 2 / 3), ("3:4", 3 / 4), ("4:5", 4 / 5), ("1:1", 1.0),
    ("5:4", 5 / 4), ("4:3", 4 / 3), ("3:2", 3 / 2), ("16:9", 16 / 9), ("2:1", 2.0), ("3:1", 3.0),
)  # fmt: skip


@dataclass(slots=True)
class Sums:
    """int64 arrays; `sizes`: width << 32 | height and `size_counts`: how often, ascending by size."""

    num_records: int
    tags: Ints  # [V] records that have the tag
    together: Ints  # [Q, V] records that have the query's tag and the tag
    having: Ints  # [Q] records that have the query's tag
    tags_a_record: Ints  # [MAX_TAGS + 1]
    sizes: Ints
    size_counts: Ints
    aspects: Ints  # [len(ASPECTS)] the nearest of them
    megapixels: Ints  # [len(MEGAPIXELS) + 1]
    ratings: Ints  # [len(RATINGS)]
    tokens: Ints  # [len(TEXTS), MAX_TOKENS + 1]
    token_sums: Ints  # [len(TEXTS)]
    lacking: Ints  # [len(LACKING)]

    def __add__(self, other: Sums) -> Sums:
        sizes, counts = merged(np.r_[self.sizes, other.sizes], np.r_[self.size_counts, other.size_counts])
        added = {name: getattr(self, name) + getattr(other, name) for name in Sums.__slots__ if "size" not in name}
        return Sums(**added, sizes=sizes, size_counts=counts)


def sums_of(table: pa.RecordBatch, lengths: TagLengths, *, num_tags: int, query_tags: Sequence[Ints]) -> Sums:
    """Add up some records. Args: table: COLUMNS.   query_tags: for each of the query's tags its ids."""
    tags = table["tags"]
    ids, per_record = tags.flatten().to_numpy(), np.asarray(tags.value_lengths().fill_null(0))
    sides = np.asarray(table["width"].fill_null(0)), np.asarray(table["height"].fill_null(0))
    width, height = (side[(sides[0] > 0) & (sides[1] > 0)].astype(np.int64) for side in sides)
    sizes, counts = merged(width << 32 | height, np.ones(len(width), np.int64))
    tokens = record_tokens(table, lengths)
    together, having = _together(ids, per_record, query_tags, num_tags)
    there = [values[values != NONE] for values in tokens.values()]
    return Sums(
        num_records=len(table),
        tags=np.bincount(ids, minlength=num_tags),
        together=together,
        having=having,
        tags_a_record=np.bincount(
            np.minimum(per_record, MAX_TAGS)[np.asarray(tags.is_valid())], minlength=MAX_TAGS + 1
        ),
        sizes=sizes,
        size_counts=counts,
        aspects=_aspects(width / height),
        megapixels=np.bincount(
            np.searchsorted(MEGAPIXELS, width * height / 1e6, "right"), minlength=len(MEGAPIXELS) + 1
        ),
        ratings=np.bincount(np.asarray(table["rating"].fill_null(0)), minlength=len(RATINGS)),
        tokens=np.stack([np.bincount(np.minimum(v, MAX_TOKENS), minlength=MAX_TOKENS + 1) for v in there]),
        token_sums=np.array([values.sum() for values in there]),
        lacking=_lacking(table, len(width)),
    )


def merged(values: Ints, counts: Ints) -> tuple[Ints, Ints]:
    """Each value once, ascending, with its counts added."""
    unique, inverse = np.unique(values, return_inverse=True)
    sums = np.zeros(len(unique), np.int64)
    np.add.at(sums, inverse, counts)
    return unique, sums


def _together(ids: Ints, per_record: Ints, query_tags: Sequence[Ints], num_tags: int) -> tuple[Ints, Ints]:
    together, having = np.zeros((len(query_tags), num_tags), np.int64), np.zeros(len(query_tags), np.int64)
    rows = np.repeat(np.arange(len(per_record)), per_record)
    for number, wanted in enumerate(query_tags):
        has = np.zeros(len(per_record), bool)
        has[rows[np.isin(ids, wanted)]] = True
        together[number], having[number] = np.bincount(ids[has[rows]], minlength=num_tags), has.sum()
    return together, having


def _aspects(ratios: Ints) -> Ints:
    """How many are nearest to each of ASPECTS, by factor."""
    logs = np.log([ratio for _, ratio in ASPECTS])
    return np.bincount(np.searchsorted((logs[1:] + logs[:-1]) / 2, np.log(ratios)), minlength=len(ASPECTS))


def _lacking(table: pa.RecordBatch, num_sized: int) -> Ints:
    without = {name: np.asarray(pc.is_null(table[name])) for name in ("image", "tags", "caption")}
    without["rating"] = np.asarray(table["rating"].fill_null(0)) == 0
    without["text"] = without["tags"] & without["caption"]
    counts = {name: int(mask.sum()) for name, mask in without.items()} | {"size": len(table) - num_sized}
    return np.array([counts[name] for name in LACKING])
