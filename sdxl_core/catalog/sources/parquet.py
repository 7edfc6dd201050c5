"""Metadata dumps in parquet: one file or a folder of them."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from sdxl_core.catalog.config import CatalogSource
from sdxl_core.catalog.parts import PartWriter, TagColumn
from sdxl_core.catalog.schema import PART_ROWS, RATING_CODES, ROWS
from sdxl_core.catalog.sources.base import Piece, Reader, prefixed, rejected
from sdxl_core.catalog.sources.columns import TAG_PREFIX, Columns, field_of, find_columns, is_list
from sdxl_core.catalog.sources.keys import BadKey, picture_key
from sdxl_core.catalog.sources.paths import file_identity, source_files
from sdxl_core.catalog.sources.values import (
    Problems,
    as_text,
    clean_lists,
    integers,
    one_line,
    rating_codes,
    separated_tags,
)
from sdxl_core.errors import ConfigError, DataError
from sdxl_core.files import digest_of
from sdxl_core.rejected import Rejected

BATCH = 8_192
_BUFFER_BYTES = 1 << 20
_IDLE_STREAMS = 8
_BLANK = pa.scalar(" ", pa.large_string())
_PLAIN_KEY = r"^[^/\\.:\x00]+$"


def plan(source: CatalogSource, work: Path) -> Iterator[Piece]:
    """Cut every file into ranges of at most PART_ROWS rows, at the borders of row groups where there are any.

    Raises: ConfigError: nothing is there.   DataError: no parquet file, or a column that is needed is not there.
    """
    for name in source_files(source.path, ".parquet", recursive=source.recursive):
        path = source.path / name
        with _errors(path), pq.ParquetFile(path) as file:
            find_columns(file.schema_arrow, source, path)
            sizes = [file.metadata.row_group(number).num_rows for number in range(file.num_row_groups)]
        for start, stop in ranges(sizes):
            digest = digest_of(name, *file_identity(path), start, stop)
            yield Piece(digest, f"rows {start}-{stop} of {path}", {"file": name, "start": start, "stop": stop})


def ranges(sizes: Sequence[int]) -> Iterator[tuple[int, int]]:
    """Row ranges of at most PART_ROWS rows: small row groups together, large ones cut."""
    start = stop = 0
    for size in sizes:
        if stop > start and stop + size - start > PART_ROWS:
            yield start, stop
            start = stop
        stop += size
        while stop - start > PART_ROWS:
            yield start, start + PART_ROWS
            start += PART_ROWS
    if stop > start:
        yield start, stop


def read(source: CatalogSource, payload: dict[str, Any], writer: PartWriter) -> list[Rejected]:
    """Read a range of rows. Rows of other ratings than `source.ratings` are left out."""
    path, start, stop = source.path / payload["file"], payload["start"], payload["stop"]
    refused: list[Rejected] = []
    with _stream_at(path, source, start) as stream:
        while start < stop:
            batch = stream.next(min(BATCH, stop - start))
            refused += _add(batch, stream.columns, source, writer, f"{path.name} row", start)
            start += batch.num_rows
    return refused


def _add(
    batch: pa.RecordBatch, columns: Columns, source: CatalogSource, writer: PartWriter, place: str, start: int
) -> list[Rejected]:
    """Give the writer a batch's rows; those that cannot be used are returned. `start`: number of the first row."""
    numbers = np.arange(start, start + batch.num_rows)
    facts = {name: _fact(name, field_of(batch, column)) for name, column in columns.facts.items()}
    if source.ratings:
        wanted = pc.is_in(facts["rating"], pa.array({RATING_CODES[word] for word in source.ratings}, pa.uint8()))
        keys, _ = _keys(field_of(batch.filter(pc.invert(wanted)), columns.id), source)
        writer.leave_out(pc.if_else(pc.equal(keys, ""), None, prefixed(source.prefix, keys)))
        batch, numbers = batch.filter(wanted), numbers[np.asarray(wanted)]
        facts = {name: fact.filter(wanted) for name, fact in facts.items()}
    keys, problems = _keys(field_of(batch, columns.id), source)
    rows = {**facts, "id": integers(field_of(batch, columns.id), pa.int64())}
    tags = [TagColumn(code, _tags(batch, column, problems)) for code, column in columns.tags]
    if columns.captions:
        rows["caption"] = pa.nulls(batch.num_rows, pa.large_string())
        for column in columns.captions:
            before, more = rows["caption"], _checked(one_line(field_of(batch, column)), problems)
            rows["caption"] = pc.coalesce(pc.binary_join_element_wise(before, more, _BLANK), before, more)
    rows["key"] = prefixed(source.prefix, keys.cast(pa.string()))
    if not problems:
        writer.add(rows, tags)
        return []
    usable = np.ones(batch.num_rows, bool)
    usable[list(problems)] = False
    mask = pa.array(usable)
    writer.add(
        {name: array.filter(mask) for name, array in rows.items()},
        [TagColumn(code, lists.filter(mask)) for code, lists in tags],
    )
    return [
        rejected(rows["key"][row].as_py() or f"{source.prefix}{place} {numbers[row]}", reason, detail)
        for row, (reason, detail) in sorted(problems.items())
    ]


def _fact(name: str, array: pa.Array) -> pa.Array:
    return rating_codes(array) if name == "rating" else integers(array, ROWS.field(name).type)


def _tags(batch: pa.RecordBatch, column: str, problems: Problems) -> pa.ListArray:
    array = field_of(batch, column)
    if is_list(array.type):
        return _checked(clean_lists(array), problems)
    return _checked(separated_tags(array, commas=not column.startswith(TAG_PREFIX)), problems)


def _checked(result: tuple[pa.Array, Problems], problems: Problems) -> pa.Array:
    """The array; its problems join the others, the first of a row stays."""
    for row, problem in result[1].items():
        problems.setdefault(row, problem)
    return result[0]


def _keys(ids: pa.Array, source: CatalogSource) -> tuple[pa.Array, Problems]:
    """The key of every row, "" where it has none."""
    is_number = pa.types.is_floating(ids.type) or pa.types.is_integer(ids.type)
    names = (integers(ids, pa.int64()) if is_number else as_text(ids)[0]).cast(pa.string())
    plain = pc.fill_null(pc.match_substring_regex(names, _PLAIN_KEY), False)
    if pc.all(plain).as_py():
        return names, {}
    problems: Problems = {}
    keys = names.to_pylist()
    for row in np.flatnonzero(~np.asarray(plain)).tolist():
        try:
            if keys[row] is None and ids[row].is_valid:
                raise BadKey("it is no whole number below 2**63" if is_number else "it cannot be read as text")
            keys[row] = picture_key(keys[row] or "", source.root_map)
        except BadKey as error:
            problems[row] = ("bad_key", f"its id is {str(ids[row].as_py())[:200]!r}: {error}")
            keys[row] = ""
    return pa.array(keys, pa.string()), problems


class _Stream:
    """The rows of one file from some row on, batch by batch: only a buffer of each column is in memory."""

    def __init__(self, path: Path, source: CatalogSource, start: int) -> None:
        self._path = path
        with _errors(path):
            self._file = pq.ParquetFile(path, pre_buffer=False, buffer_size=_BUFFER_BYTES)
        schema = self._file.schema_arrow
        self.columns = find_columns(schema, source, path)
        sizes = [self._file.metadata.row_group(number).num_rows for number in range(self._file.num_row_groups)]
        self._group_starts = np.concatenate([[0], np.cumsum(sizes)])
        group = self._group_of(start)
        self.row = int(self._group_starts[group])
        self._batches = self._file.iter_batches(
            BATCH,
            row_groups=range(group, len(sizes)),
            columns=self.columns.top_level(schema),
            use_threads=False,
        )
        self._left: pa.RecordBatch | None = None
        self.skip_to(start)

    def next(self, num_rows: int) -> pa.RecordBatch:
        """At least one and at most `num_rows` rows."""
        with _errors(self._path):
            batch = self._left if self._left is not None else next(self._batches)
        self._left = batch.slice(num_rows) if batch.num_rows > num_rows else None
        batch = batch.slice(0, num_rows)
        self.row += batch.num_rows
        return batch

    def leads_to(self, row: int) -> bool:
        """Whether going on from here is no longer than beginning at the row group of `row`."""
        return bool(self._group_starts[self._group_of(row)] <= self.row <= row)

    @property
    def within_group(self) -> bool:
        """Whether it stands where no other stream could begin."""
        return self.row not in self._group_starts

    def _group_of(self, row: int) -> int:
        return int(np.searchsorted(self._group_starts, row, "right")) - 1

    def skip_to(self, row: int) -> None:
        while self.row < row:
            self.next(row - self.row)


@dataclass(frozen=True, slots=True)
class _Idle:
    """A stream that stands where some piece ended: the next piece of a large row group goes on from there, because
    parquet can be entered only at the beginning of a row group."""

    identity: tuple[Any, ...]
    stream: _Stream


_idle: list[_Idle] = []
_idle_lock = threading.Lock()


@contextmanager
def _stream_at(path: Path, source: CatalogSource, start: int) -> Iterator[_Stream]:
    """A stream that stands at row `start`; one that was left before it in the same row group is used again."""
    with _errors(path):
        identity = (path, *file_identity(path), source.model_dump_json())
    stream = _take_idle(identity, start) or _Stream(path, source, start)
    stream.skip_to(start)
    yield stream
    if stream.within_group:
        with _idle_lock:
            _idle.append(_Idle(identity, stream))
            del _idle[:-_IDLE_STREAMS]


def _take_idle(identity: tuple[Any, ...], start: int) -> _Stream | None:
    with _idle_lock:
        fitting = [idle for idle in _idle if idle.identity == identity and idle.stream.leads_to(start)]
        if not fitting:
            return None
        best = max(fitting, key=lambda idle: idle.stream.row)
        _idle.remove(best)
        return best.stream


@contextmanager
def _errors(path: Path) -> Iterator[None]:
    try:
        yield
    except FileNotFoundError as error:
        raise ConfigError(f"{path}: the file is not there any more.") from error
    except (pa.ArrowInvalid, pa.ArrowNotImplementedError, OSError, StopIteration) as error:
        raise DataError(
            f"{path}: not a parquet file, or a damaged one ({str(error).splitlines()[0] if str(error) else error}). "
            f"Copy or download it again."
        ) from error


READER = Reader(plan, read)
