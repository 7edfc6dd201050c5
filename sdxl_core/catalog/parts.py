"""One part of a catalog: rows of one source, written once and memory-mapped by every reader."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from operator import mul
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple, Self

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from sdxl_core.catalog.mapped import Mapped, map_arrow, write_arrow
from sdxl_core.catalog.schema import COLUMNS_OF_USE, ROWS, TAGS, VOCABULARY
from sdxl_core.errors import DataError

Ints = np.ndarray[Any, np.dtype[Any]]
_HASH_STEP = np.uint64(0x9E3779B97F4A7C15)
_64_BITS = 2**64 - 1


class TagColumn(NamedTuple):
    """Tags of one category. `values`: list<string>, one list a row, null where nothing is known of the row's tags."""

    category: int
    values: pa.ListArray


class PartWriter:
    """Collects rows, tags as text, and writes them to `PATH.rows.arrow` and `PATH.vocab.arrow` when the block ends.

    Args:   path: without the two endings.   use: the groups of columns that are kept; the others become null.
    """

    def __init__(self, path: Path, *, use: Sequence[str] = ("images", "facts", "tags", "captions")) -> None:
        self._path = path
        self._names = {"key", *(name for group, names in COLUMNS_OF_USE.items() if group in use for name in names)}
        self._dictionaries: list[tuple[int, pa.Array]] = []  # category and tags, as met batch by batch
        self._num_met = 0
        self._batches: list[pa.RecordBatch] = []
        self.num_rows = 0
        self.num_filtered = 0  # rows that the source's `ratings` leave out
        self._left_out: list[pa.Array] = []  # keys of such rows

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is None:
            if self.num_filtered:
                _write_left_out(left_out_path(self._path), self._left_out)
            vocabulary, ids = self._unified()
            rows = pa.Table.from_batches(self._batches, schema=ROWS).combine_chunks().to_batches()
            batch = rows[0] if rows else pa.RecordBatch.from_pylist([], schema=ROWS)
            lists = batch["tags"]
            tags = ids[lists.flatten().to_numpy()]
            lists = _lists(np.asarray(pc.fill_null(pc.list_value_length(lists), 0)), tags, lists.is_null())
            counts = pa.array(np.bincount(tags, minlength=len(vocabulary[0])))
            write_arrow(vocab_path(self._path), pa.RecordBatch.from_arrays([*vocabulary, counts], schema=VOCABULARY))
            write_arrow(
                rows_path(self._path), batch.set_column(ROWS.get_field_index("tags"), ROWS.field("tags"), lists)
            )

    def add(self, columns: Mapping[str, pa.Array], tags: Sequence[TagColumn] = ()) -> None:
        """Append rows.

        Args:   columns: arrays by the names of `schema.ROWS` but `tags` and `key_hash`; all of one length; `key` must
                be there, what is left out is null.
                tags: a row's tags are the concatenation over these columns, without repetition of a (category, tag).
        """
        num_rows = len(columns["key"])
        arrays = {name: array for name, array in columns.items() if name in self._names}
        arrays["tags"] = self._tag_ids(tags if "tags" in self._names else (), num_rows)
        arrays["key_hash"] = key_hashes(columns["key"])
        nothing = pa.nulls(num_rows)
        self._batches.append(
            pa.RecordBatch.from_arrays(
                [arrays.get(field.name, nothing).cast(field.type) for field in ROWS], schema=ROWS
            )
        )
        self.num_rows += num_rows

    def leave_out(self, keys: pa.Array) -> None:
        """Rows that the source's `ratings` leave out: what has these keys leaves the catalog, whoever else tells of it.

        Args:   keys: texts; null for a row that names no picture.
        """
        self.num_filtered += len(keys)
        self._left_out.append(keys.drop_null().cast(pa.string()))

    def _tag_ids(self, columns: Sequence[TagColumn], num_rows: int) -> pa.ListArray:
        if not columns:
            return pa.nulls(num_rows, TAGS)
        lengths = [np.asarray(pc.fill_null(pc.list_value_length(column.values), 0)) for column in columns]
        unknown = pa.array(np.logical_and.reduce([np.asarray(pc.is_null(column.values)) for column in columns]))
        rows, values = _without_repetition(*_interleaved(lengths, self._met(columns), num_rows))
        return _lists(np.bincount(rows, minlength=num_rows), values.astype(np.uint32), unknown)

    def _met(self, columns: Sequence[TagColumn]) -> list[Ints]:
        """A number for every tag of each column: the same for the same tag and category within this call only."""
        numbers: dict[int, Ints] = {}
        for category in dict.fromkeys(column.category for column in columns):
            places = [place for place, column in enumerate(columns) if column.category == category]
            tags = [columns[place].values.flatten() for place in places]
            encoded = (pa.concat_arrays(tags) if len(tags) > 1 else tags[0]).dictionary_encode()
            indices = np.asarray(encoded.indices, np.int64) + self._num_met
            numbers.update(zip(places, np.split(indices, np.cumsum([len(part) for part in tags])[:-1]), strict=True))
            self._dictionaries.append((category, encoded.dictionary.cast(pa.string())))
            self._num_met += len(encoded.dictionary)
        return [numbers[place] for place in range(len(columns))]

    def _unified(self) -> tuple[tuple[pa.Array, pa.Array], Ints]:
        """Tags and their categories, each once, and the position among them of every number that `_met` gave."""
        starts = np.cumsum([0, *(len(tags) for _, tags in self._dictionaries)])
        ids = np.zeros(self._num_met, np.uint32)
        tags, categories = [pa.array([], pa.string())], [pa.array([], pa.uint8())]
        num_tags = 0
        for category in sorted({category for category, _ in self._dictionaries}):
            places = [place for place, (owner, _) in enumerate(self._dictionaries) if owner == category]
            encoded = pa.concat_arrays([self._dictionaries[place][1] for place in places]).dictionary_encode()
            numbers = np.concatenate([np.arange(starts[place], starts[place + 1]) for place in places])
            ids[numbers] = np.asarray(encoded.indices) + num_tags
            tags.append(encoded.dictionary)
            categories.append(pa.array(np.full(len(encoded.dictionary), category, np.uint8)))
            num_tags += len(encoded.dictionary)
        return (pa.concat_arrays(tags), pa.concat_arrays(categories)), ids


@dataclass(frozen=True)
class Part:
    """A finished part, opened by memory mapping: nothing is read until it is used, and processes share the pages."""

    path: Path

    @property
    def rows(self) -> pa.RecordBatch:
        """All rows, `schema.ROWS`. Raises: DataError: the file is gone or damaged."""
        return self._rows.batch

    @property
    def vocabulary(self) -> pa.RecordBatch:
        """The part's tags, `schema.VOCABULARY`; `rows.tags` are positions in it. Raises: as `rows`."""
        return self._vocabulary.batch

    @property
    def sizes(self) -> pa.RecordBatch | None:
        """What `sizes.py` has read of the part's pictures, a row each, `schema.SIZES`; None where that is nothing."""
        return self._sizes and self._sizes.batch

    def forget(self) -> None:
        """Give back the pages that were read, see `Mapped.forget`."""
        for name in ("_rows", "_vocabulary", "_sizes"):
            if self.__dict__.get(name) is not None:  # it was opened
                self.__dict__[name].forget()

    @cached_property
    def _rows(self) -> Mapped:
        return map_arrow(rows_path(self.path))

    @cached_property
    def _vocabulary(self) -> Mapped:
        return map_arrow(vocab_path(self.path))

    @cached_property
    def _sizes(self) -> Mapped | None:
        path = sizes_path(self.path)
        try:
            mapped = map_arrow(path) if path.exists() else None
        except DataError:  # damaged: its sizes are read again
            return None
        return mapped if mapped is not None and mapped.batch.num_rows == self.rows.num_rows else None


def left_out_path(path: Path) -> Path:
    """Where the keys are that a part takes out of the catalog: a `Part` whose rows have `key` and `key_hash` only."""
    return path.with_name(f"{path.name}.left_out")


def rows_path(path: Path) -> Path:
    return path.with_name(f"{path.name}.rows.arrow")


def sizes_path(path: Path) -> Path:
    return path.with_name(f"{path.name}.sizes.arrow")


def vocab_path(path: Path) -> Path:
    return path.with_name(f"{path.name}.vocab.arrow")


def key_hashes(keys: pa.StringArray) -> pa.UInt64Array:
    """A 64-bit polynomial hash of each key's UTF-8 bytes, modulo 2**64. Equal hashes need not mean equal keys."""
    keys = keys.cast(pa.large_string())
    offsets = np.frombuffer(keys.buffers()[1], np.int64)[keys.offset : keys.offset + len(keys) + 1]
    if not len(keys) or offsets[0] == offsets[-1]:
        return pa.array(np.zeros(len(keys), np.uint64))
    data = np.frombuffer(keys.buffers()[2], np.uint8)[offsets[0] : offsets[-1]]
    starts = offsets[:-1] - offsets[0]
    lengths = np.diff(offsets)
    powers = np.cumprod(np.full(int(lengths.max()) + 1, _HASH_STEP))
    terms = (data.astype(np.uint64) + np.uint64(1)) * powers[np.arange(len(data)) - np.repeat(starts, lengths)]
    sums = np.zeros(len(keys), np.uint64)
    filled = lengths > 0  # reduceat over an empty range would take one element
    sums[filled] = np.add.reduceat(terms, starts[filled])
    sums ^= sums >> np.uint64(29)
    return pa.array(sums * np.uint64(0xBF58476D1CE4E5B9))


def key_hash(key: str) -> int:
    """The same hash of one key, in a hundredth of the time that an array of one takes."""
    data = key.encode("utf-8", "surrogateescape")
    powers, total = _powers(len(data))
    total += int(sum(map(mul, data, powers)))
    total &= _64_BITS
    return (total ^ total >> 29) * 0xBF58476D1CE4E5B9 & _64_BITS


@lru_cache(maxsize=1024)
def _powers(length: int) -> tuple[tuple[int, ...], int]:
    """The first powers of the hash's step, modulo 2**64, and their sum."""
    powers = tuple(int(pow(int(_HASH_STEP), number, 2**64)) for number in range(1, length + 1))
    return powers, sum(powers)


def _write_left_out(path: Path, keys: Sequence[pa.Array]) -> None:
    texts = pa.concat_arrays(keys)
    write_arrow(rows_path(path), pa.RecordBatch.from_arrays([texts, key_hashes(texts)], names=["key", "key_hash"]))


def _lists(lengths: Ints, values: Ints, unknown: pa.Array) -> pa.ListArray:
    """Consecutive runs of `values` as lists, null where `unknown`."""
    offsets = np.zeros(len(lengths) + 1, np.int32)
    np.cumsum(lengths, out=offsets[1:])
    return pa.ListArray.from_arrays(pa.array(offsets), pa.array(values), type=TAGS, mask=unknown)


def _interleaved(lengths: Sequence[Ints], values: Sequence[Ints], num_rows: int) -> tuple[Ints, Ints]:
    """Row number and value of every tag, row by row, the columns one after the other within a row."""
    if len(values) == 1:
        return np.repeat(np.arange(num_rows), lengths[0]), values[0]
    starts = np.zeros(num_rows + 1, np.int64)
    np.cumsum(np.sum(lengths, axis=0), out=starts[1:])
    rows, merged = np.repeat(np.arange(num_rows), np.diff(starts)), np.empty(starts[-1], np.int64)
    begin = starts[:-1].copy()
    for length, value in zip(lengths, values, strict=True):
        merged[np.arange(len(value)) + np.repeat(begin - (np.cumsum(length) - length), length)] = value
        begin += length
    return rows, merged


def _without_repetition(rows: Ints, values: Ints) -> tuple[Ints, Ints]:
    """Only the first occurrence of each value in its row."""
    if not len(values):
        return rows, values
    pairs = rows * (int(values.max()) + 1) + values
    ordered = np.sort(pairs)
    if not (ordered[1:] == ordered[:-1]).any():
        return rows, values
    _, first = np.unique(pairs, return_index=True)
    first.sort()
    return rows[first], values[first]
