"""Which records a query picks: conditions as columns of truth values, from a scan or from the index."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple, Protocol

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from sdxl_core.catalog.records import Catalog, Chunk
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
    walk,
)
from sdxl_core.query.names import TagNames

Ints = np.ndarray[Any, np.dtype[Any]]
Mask = np.ndarray[Any, np.dtype[np.bool_]]
DRAWN_AT_ONCE = 1 << 16  # records
DECIMALS = 2  # ratio:1.78 and mpixels:2.5 mean numbers that round to these


class Conditions(Protocol):
    """Records, and which of them meet a single condition: as truth values, or packed, eight records a byte.

    Masks of one `Conditions` are joined by &, | and ~ and counted by `count`; bits behind the last record are anything.
    """

    def everything(self) -> Ints: ...

    def meet(self, condition: Expression) -> Ints: ...

    def count(self, mask: Ints) -> int: ...


class Selection(NamedTuple):
    """`records`: ascending (int64).   `num_matched`: before limit and random."""

    records: Ints
    num_matched: int


def evaluate(expression: Expression, conditions: Conditions) -> Ints:
    """Which records an expression is true for, as a mask of `conditions`."""
    if isinstance(expression, Everything):
        return conditions.everything()
    if isinstance(expression, Not):
        return ~evaluate(expression.part, conditions)
    if isinstance(expression, And | Or):
        merge = np.bitwise_and if isinstance(expression, And) else np.bitwise_or
        mask = evaluate(expression.parts[0], conditions)
        for number, part in enumerate(expression.parts[1:]):
            mask = merge(mask, evaluate(part, conditions), out=mask if number else None)
        return mask
    return conditions.meet(expression)


def select_by_scan(catalog: Catalog, query: Query) -> Selection:
    """Read the needed columns of every record."""
    found: list[Ints] = [np.zeros(0, np.int64)]
    for chunk, conditions in scan(catalog, [query.where]):
        found.append(np.flatnonzero(evaluate(query.where, conditions)) + chunk.start)
    return narrowed(query, np.concatenate(found), lambda some: catalog.take(some, ["key_hash"])["key_hash"].to_numpy())


def narrowed(query: Query, records: Ints, hashes: Callable[[Ints], Ints]) -> Selection:
    """Apply random: and limit:. A draw depends on seed and keys only, not on the order of the catalog.

    Args:   hashes: the key hashes of given records (uint64).
    """
    num_matched = len(records)
    if query.random is not None and query.random < len(records):
        records = records[_drawn(records, query.random, query.seed, hashes)]
    if query.limit is not None:
        records = records[: query.limit]
    return Selection(records, num_matched)


def scan(catalog: Catalog, expressions: Sequence[Expression]) -> Iterator[tuple[Chunk, ScannedConditions]]:
    """Chunks of the catalog with what the expressions ask for."""
    conditions = {part for expression in expressions for part in walk(expression)}
    tags = [part for part in conditions if isinstance(part, Tag | Wildcard)]
    codes = _TagCodes.of(catalog, tags)
    columns = {name for part in conditions for name in _columns_of(part)} or {"key_hash"}
    for chunk in catalog.chunks(sorted(columns)):
        yield chunk, ScannedConditions(chunk.table, codes)


class _TagCodes(NamedTuple):
    """For every tag of the catalog, one bit for each of `terms` that means it (uint8 to uint64 [num_tags, words])."""

    terms: dict[Expression, int]
    bits: Ints

    @classmethod
    def of(cls, catalog: Catalog, terms: Sequence[Tag | Wildcard]) -> _TagCodes:
        if not terms:
            return cls({}, np.zeros((0, 0), np.uint8))
        names = TagNames.of(catalog.vocabulary)
        width = next(size for size in (8, 16, 32, 64) if len(terms) <= size or size == 64)
        bits = np.zeros((-(-len(terms) // width), len(catalog.vocabulary)), f"u{width // 8}")
        for number, term in enumerate(terms):
            bits[number // width, names.ids_of(term)] |= bits.dtype.type(1 << (number % width))
        return cls({term: number for number, term in enumerate(terms)}, bits)

    def met_by(self, lists: pa.ListArray) -> Ints:
        """The bits of all tags of each row together, [words, num_rows]."""
        met = np.zeros((len(self.bits), len(lists)), self.bits.dtype)
        offsets = np.asarray(lists.offsets)
        filled = offsets[1:] > offsets[:-1]
        if filled.any():
            ids = lists.values.to_numpy()[offsets[0] : offsets[-1]]
            starts = (offsets[:-1] - offsets[0])[filled]
            for word, bits in enumerate(self.bits):
                met[word, filled] = np.bitwise_or.reduceat(bits[ids], starts)
        return met


class ScannedConditions:
    """The conditions on one chunk of records; masks are truth values, one a record."""

    def __init__(self, table: pa.RecordBatch, codes: _TagCodes) -> None:
        self._table, self._codes = table, codes
        self._met = codes.met_by(table["tags"]) if codes.terms else None

    def everything(self) -> Mask:
        return np.ones(self._table.num_rows, bool)

    def count(self, mask: Ints) -> int:
        return int(np.count_nonzero(mask))

    def meet(self, condition: Expression) -> Mask:
        if isinstance(condition, Tag | Wildcard):
            assert self._met is not None
            width = self._met.dtype.itemsize * 8
            number = self._codes.terms[condition]
            mask: Mask = (self._met[number // width] >> self._met.dtype.type(number % width)) & 1 == 1
            return mask
        if isinstance(condition, Range | Values):
            mask = numbers_meet(condition, self._numbers)
            for column in stored_columns(condition):
                mask &= np.asarray(self._column(column).is_valid())
            return mask
        if isinstance(condition, Rating):
            return is_any(self._numbers("rating"), condition.codes)
        if isinstance(condition, FileType):
            return has_ending(self._table["image"], condition.endings)
        if isinstance(condition, Source):
            return has_prefix(self._table["key"], condition.prefixes)
        if isinstance(condition, Has):
            return np.asarray(self._table[condition.what].is_valid())
        raise TypeError(condition)

    def _numbers(self, name: str) -> Ints:
        numbers: Ints = pc.fill_null(self._column(name), 0).to_numpy(zero_copy_only=False)
        return numbers

    def _column(self, name: str) -> pa.Array:
        if name == "tagcount":
            return pc.list_value_length(self._table["tags"])
        return self._table[name]


_COLUMNS: dict[str, tuple[str, ...]] = {
    "favcount": ("fav_count",),
    "filesize": ("num_bytes",),
    "mpixels": ("width", "height"),
    "ratio": ("width", "height"),
    "tagcount": ("tagcount",),
}


def _columns_of(condition: Expression) -> tuple[str, ...]:
    """The columns of the catalog that a condition looks at."""
    if isinstance(condition, Tag | Wildcard):
        return ("tags",)
    if isinstance(condition, Range | Values):
        return tuple("tags" if name == "tagcount" else name for name in stored_columns(condition))
    if isinstance(condition, Rating):
        return ("rating",)
    if isinstance(condition, FileType):
        return ("image",)
    if isinstance(condition, Source):
        return ("key",)
    return (condition.what,) if isinstance(condition, Has) else ()


def stored_columns(condition: Range | Values) -> tuple[str, ...]:
    """The columns that a number is made of; it is unknown where one of them is."""
    return _COLUMNS.get(condition.number, (condition.number,))


def numbers_meet(condition: Range | Values, column: Callable[[str], Ints]) -> Mask:
    """Whether each record's number is asked for; anything where one of its stored columns is unknown.

    Args:   column: the values of a stored column, 0 where unknown.
    """
    numbers = _number(condition.number, column)
    rounded = condition.number in ("ratio", "mpixels")
    if isinstance(condition, Values):
        wanted = np.asarray(condition.values)
        if rounded:
            numbers, wanted = np.round(numbers, DECIMALS), np.round(wanted, DECIMALS)
        return is_any(numbers, wanted.tolist())
    low, high = condition.low, condition.high
    if rounded and low is not None and low == high:
        return is_any(np.round(numbers, DECIMALS), [round(low, DECIMALS)])
    sides: list[Mask] = []
    if low is not None:
        sides.append(numbers >= low if condition.low_included else numbers > low)
    if high is not None:
        sides.append(numbers <= high if condition.high_included else numbers < high)
    return sides[0] & sides[1] if len(sides) > 1 else sides[0]


def _number(name: str, column: Callable[[str], Ints]) -> Ints:
    """NaN, which is in no range, for a shape without height."""
    if name not in ("mpixels", "ratio"):
        return column(_COLUMNS.get(name, (name,))[0])
    width, height = column("width"), column("height").astype(np.float64)
    height[height <= 0] = np.nan
    return width * height / 1e6 if name == "mpixels" else width / height


def is_any(numbers: Ints, values: Sequence[float]) -> Mask:
    """Which numbers are one of a few values; comparing with each in turn is quicker than a sorted search."""
    mask: Mask = np.zeros(len(numbers), bool)
    for value in values:
        mask |= numbers == value
    return mask


def has_ending(images: pa.Array, endings: Sequence[str]) -> Mask:
    """Which names end in one of these, in any case."""
    lower = pc.utf8_lower(images)
    masks = [np.asarray(pc.fill_null(pc.ends_with(lower, f".{ending}"), False)) for ending in endings]
    return np.asarray(np.logical_or.reduce(masks))


def has_prefix(keys: pa.Array, prefixes: Sequence[str]) -> Mask:
    """Which keys begin with one of these."""
    return np.asarray(np.logical_or.reduce([np.asarray(pc.starts_with(keys, prefix)) for prefix in prefixes]))


def _drawn(records: Ints, count: int, seed: int, hashes: Callable[[Ints], Ints]) -> Ints:
    """Places, ascending, of the `count` records with the lowest draws; of equal draws the first.

    Draws are spread evenly, so nearly all can be passed over at once: those above a limit that a few more than `count`
    are expected below. Where fewer are, none is passed over.
    """
    expected = (count + 6 * count**0.5 + 16) / len(records)
    for limit in (min(int(expected * 2**64), 2**64 - 1), 2**64 - 1):
        places, draws = [np.zeros(0, np.int64)], [np.zeros(0, np.uint64)]
        for start in range(0, len(records), DRAWN_AT_ONCE):
            of_block = _mixed(hashes(records[start : start + DRAWN_AT_ONCE]), seed)
            low = np.flatnonzero(of_block <= np.uint64(limit))
            places.append(low + start)
            draws.append(of_block[low])
        if sum(map(len, places)) >= count:
            break
    return np.concatenate(places)[_lowest(np.concatenate(draws), count)]


def _lowest(draws: Ints, count: int) -> Ints:
    """Places, ascending, of the `count` lowest draws; of equal ones the first."""
    if not count:
        return np.zeros(0, np.int64)
    highest = np.partition(draws, count - 1)[count - 1]
    below, equal = np.flatnonzero(draws < highest), np.flatnonzero(draws == highest)
    return np.sort(np.concatenate([below, equal[: count - len(below)]]))


def _mixed(hashes: Ints, seed: int) -> Ints:
    """splitmix64 of hash and seed: a draw that any subset of the records agrees on."""
    mixed = hashes + np.uint64((seed * 0x9E3779B97F4A7C15 + 0x9E3779B97F4A7C15) % 2**64)
    mixed = (mixed ^ (mixed >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    mixed = (mixed ^ (mixed >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return mixed ^ (mixed >> np.uint64(31))
