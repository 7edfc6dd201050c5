"""The index of a latent set: one row a kept picture, in the order of meta_lat.json, memory-mapped by every reader.

Below `latents/`:
    index.arrow         ROWS, uncompressed, in record batches of exactly BATCH_ROWS rows (the last one may be shorter)
    index.files.arrow   FILES: the files that hold the rows' latents; `file` is a row number in it
    index.keys.arrow    KEYS: hashes of all keys, ascending, and the row of each: where a key is
    index.json          fingerprint, digest of meta_lat.json, CRC-32 of every batch; written last, marks the rest whole
An index that replaces another is written beside it (`index.b.arrow`, …; the next one takes the plain names again), and
takes effect when index.json is replaced: a kill leaves the old one.
Every batch is checked against its CRC when it is first looked at, so a damaged one is never served.
"""

from __future__ import annotations

import mmap
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO, Self

import numpy as np
import pyarrow as pa

from sdxl_core.catalog.parts import key_hashes
from sdxl_core.errors import DataError
from sdxl_core.files import atomic_writer, write_atomic
from sdxl_core.latents.formats.checksum import crc32
from sdxl_core.latents.ledger import LatentFile
from sdxl_core.latents.tables import checked_json, parse_checked

Ints = np.ndarray[Any, np.dtype[Any]]
FORMAT = 1
BATCH_ROWS = 65_536
INDEX, INDEX_FILES, INDEX_KEYS, INDEX_END = "index.arrow", "index.files.arrow", "index.keys.arrow", "index.json"
NAMES = tuple(
    {name: name.replace("index.", f"index.{turn}") for name in (INDEX, INDEX_FILES, INDEX_KEYS)} for turn in ("", "b.")
)
ROWS = pa.schema(
    [
        pa.field("key", pa.string(), nullable=False),
        pa.field("tags", pa.string()),  # as in the metadata JSON; null: it has none
        pa.field("caption", pa.string()),
        pa.field("bucket_width_px", pa.int32(), nullable=False),
        pa.field("bucket_height_px", pa.int32(), nullable=False),
        pa.field("original_width_px", pa.int32(), nullable=False),
        pa.field("original_height_px", pa.int32(), nullable=False),
        *(pa.field(f"crop_{side}", pa.float64(), nullable=False) for side in ("left", "top", "right", "bottom")),
        pa.field("file", pa.int32(), nullable=False),
        pa.field("row", pa.int32(), nullable=False),  # in a packed file; -1: the file is one picture's
        pa.field("crc32", pa.uint32(), nullable=False),  # of the whole file; in a packed file of the row's payload
        pa.field("key_hash", pa.uint64(), nullable=False),
    ]
)
FILES = pa.schema(
    [
        pa.field("path", pa.string(), nullable=False),  # POSIX, below latents/
        pa.field("num_bytes", pa.int64(), nullable=False),
        pa.field("layout", pa.string(), nullable=False),  # per_image or packed
    ]
)
KEYS = pa.schema([pa.field("key_hash", pa.uint64(), nullable=False), pa.field("row", pa.uint32(), nullable=False)])
AGAIN = "Run cache-latents again: it makes the index anew and encodes nothing that is there."


class LatentIndex:
    """A finished index. Holds nothing but what is looked at; processes share the pages.

    `fingerprint`: of the settings the latents were made with.   `metadata_sha256`: of the meta_lat.json it goes with.
    """

    def __init__(self, latents: Path, told: Mapping[str, Any]) -> None:
        self.folder = latents
        self.fingerprint: str = told["fingerprint"]
        self.metadata_sha256: str = told["metadata_sha256"]
        self.num_rows: int = told["num_rows"]
        self.made_from: str = told["made_from"]
        self._rows, self._files, self._keys = (
            _Batches(latents / told["names"][name], told["files"][name]) for name in (INDEX, INDEX_FILES, INDEX_KEYS)
        )

    @classmethod
    def exists(cls, latents: Path) -> bool:
        """Whether a finished index is below a latents folder."""
        return (latents / INDEX_END).is_file()

    @classmethod
    def open(cls, latents: Path) -> Self:
        """Args: latents: the folder that has the latents. Raises: DataError: no index, or a damaged one."""
        try:
            told = parse_checked((latents / INDEX_END).read_bytes())
            if told is None:
                raise DataError(f"{latents / INDEX_END}: damaged. {AGAIN}")
            if told["format"] != FORMAT:
                raise DataError(
                    f"{latents / INDEX_END}: an index of format {told['format']}; this version reads {FORMAT}. {AGAIN}"
                )
            return cls(latents, told)
        except FileNotFoundError as error:
            raise DataError(f"{latents}: has no index of its latents ({error.filename}). {AGAIN}") from error
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise DataError(f"{latents / INDEX_END}: damaged, or not an index ({error}). {AGAIN}") from error

    def chunks(self, columns: Sequence[str], *, checked: bool = True) -> Iterator[pa.RecordBatch]:
        """All rows in order, BATCH_ROWS at a time, views of the mapped file.

        Args:   columns: of `ROWS`.   checked: False reads nothing but these columns; they may then be damaged.
        """
        for number in range(self._rows.count):
            yield (self._rows.batch(number) if checked else self._rows.unchecked(number)).select(list(columns))

    def batch(self, number: int) -> pa.RecordBatch:
        """Rows number * BATCH_ROWS and following, a view of the mapped file. Raises: as `take`."""
        return self._rows.batch(number)

    def sorted_hashes(self) -> tuple[Ints, Ints]:
        """Hashes of all keys, ascending, and the row of each; views of the mapped file. Raises: as `take`."""
        if not self.num_rows:
            return np.zeros(0, np.uint64), np.zeros(0, np.uint32)
        table = self._keys.batch(0)
        return table["key_hash"].to_numpy(), table["row"].to_numpy()

    def take(self, rows: Sequence[int] | Ints, columns: Sequence[str]) -> pa.RecordBatch:
        """The columns of rows by number, in the order given. Raises: IndexError.   DataError: a damaged batch."""
        return self._rows.take(np.asarray(rows, np.int64), self.num_rows, columns)

    def files(self, numbers: Sequence[int] | Ints) -> pa.RecordBatch:
        """`FILES` of files by number. Raises: as `take`."""
        return self._files.take(np.asarray(numbers, np.int64), self._files.num_rows, FILES.names)

    def verify(self) -> list[str]:
        """Read every byte of the index. Returns what is wrong, one sentence a damaged batch."""
        problems = []
        for table in (self._rows, self._files, self._keys):
            for number in range(table.count):
                try:
                    table.batch(number, again=True)
                except DataError as error:
                    problems.append(str(error))
        return problems


class IndexWriter:
    """Writes an index as its rows come; it takes effect when `finish` was called and the block ends.

    `made_from`: identity of what the rows were made from, for whoever asks whether the index is up to date.
    Holds 12 bytes a row (hashes and rows of all keys).
    """

    def __init__(self, latents: Path, *, fingerprint: str, made_from: str) -> None:
        self._latents = latents
        self._told = {"format": FORMAT, "fingerprint": fingerprint, "made_from": made_from}
        self._hashes: list[Ints] = []
        self._end: dict[str, Any] | None = None

    def __enter__(self) -> Self:
        self._stack = ExitStack()
        self._names = _free_names(self._latents)
        self._rows = self._stack.enter_context(_TableWriter(self._latents / self._names[INDEX], ROWS))
        self._files = self._stack.enter_context(_TableWriter(self._latents / self._names[INDEX_FILES], FILES))
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stack.__exit__(kind, error, trace)
        if error is None and self._end is not None:
            files = {INDEX: self._rows.told(), INDEX_FILES: self._files.told(), INDEX_KEYS: self._write_keys()}
            told = self._told | self._end | {"num_rows": self._rows.num_rows, "names": self._names, "files": files}
            write_atomic(self._latents / INDEX_END, checked_json(told))
            for name in (spelled for names in NAMES for spelled in names.values()):
                if name not in self._names.values():
                    (self._latents / name).unlink(missing_ok=True)

    def add_files(self, paths: pa.StringArray, num_bytes: Ints, layout: str) -> int:
        """Name files. Returns the number of the first; the others follow."""
        first = self._files.num_rows
        layouts = pa.array([layout] * len(paths), pa.string())
        self._files.add([paths, pa.array(num_bytes, pa.int64()), layouts])
        return first

    def add(self, columns: Mapping[str, Any]) -> None:
        """Append rows. Args: columns: arrays of one length by the names of `ROWS` but key_hash; tags and caption may be
        left out."""
        num_rows = len(columns["key"])
        arrays = [columns.get(field.name, pa.nulls(num_rows, field.type)) for field in ROWS if field.name != "key_hash"]
        hashes = key_hashes(pa.array(columns["key"], pa.string()))
        self._hashes.append(hashes.to_numpy())
        self._rows.add([*arrays, hashes])

    def finish(self, *, metadata_sha256: str) -> None:
        """All rows are there, and so is the meta_lat.json they go with."""
        self._end = {"metadata_sha256": metadata_sha256}

    def _write_keys(self) -> dict[str, Any]:
        hashes = np.concatenate([*self._hashes, np.zeros(0, np.uint64)])
        order = np.argsort(hashes, kind="stable").astype(np.uint32)
        with _TableWriter(self._latents / self._names[INDEX_KEYS], KEYS, batch_rows=max(1, len(order))) as writer:
            writer.add([pa.array(hashes[order]), pa.array(order)])
        return writer.told()


class FileNumbers:
    """Numbers in an index of the files of several shards; each file is entered when it is first asked for."""

    def __init__(self, writer: IndexWriter, layout: str) -> None:
        self._writer, self._layout = writer, layout
        self._known: dict[int, Ints] = {}

    def of(self, shard: int, files: Sequence[LatentFile], wanted: Ints) -> Ints:
        """int32: the number in the index of each wanted one of a shard's files. Args: wanted: positions in `files`."""
        known = self._known.setdefault(shard, np.full(len(files), -1, np.int32))
        new = np.unique(wanted[known[wanted] < 0])
        if len(new):
            some = [files[number] for number in new.tolist()]
            sizes = np.array([file.num_bytes for file in some], np.int64)
            first = self._writer.add_files(pa.array([file.path for file in some], pa.string()), sizes, self._layout)
            known[new] = np.arange(first, first + len(new))
        return known[wanted]


def _free_names(latents: Path) -> dict[str, str]:
    """Names that the index as it is does not use: it stays whole until the new one takes effect."""
    try:
        told = parse_checked((latents / INDEX_END).read_bytes())
    except (OSError, ValueError):
        told = None
    return NAMES[1] if told is not None and told.get("names") == NAMES[0] else NAMES[0]


class _CheckedFile:
    """A file that counts and sums what is written to it, for Arrow."""

    closed = False

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self.position = self.sum = 0

    def write(self, data: Any) -> int:
        view = memoryview(data)
        self._file.write(view)
        self.position += view.nbytes
        self.sum = crc32(view, self.sum)
        return view.nbytes

    def tell(self) -> int:
        return self.position

    def flush(self) -> None:
        self._file.flush()

    def writable(self) -> bool:
        return True

    def close(self) -> None:
        """Arrow closes what it writes to; the file is closed, and takes its name, at the end of its own block."""


class _TableWriter:
    """An Arrow IPC file in batches of exactly `batch_rows` rows, whole or not at all, with a CRC-32 a batch."""

    def __init__(self, path: Path, schema: pa.Schema, *, batch_rows: int = BATCH_ROWS) -> None:
        self._path, self._schema, self._batch_rows = path, schema, batch_rows
        self._pending: list[pa.RecordBatch] = []
        self._num_pending = 0
        self._batches: list[tuple[int, int, int]] = []
        self.num_rows = self._summed = 0

    def __enter__(self) -> Self:
        self._stack = ExitStack()
        self._file = _CheckedFile(self._stack.enter_context(atomic_writer(self._path)))
        self._writer = pa.ipc.new_file(self._file, self._schema)
        self._edges = [self._sum_up()]
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is None:
            self._flush(at_least=1)
            self._writer.close()
            self._edges.append(self._sum_up())
        self._stack.__exit__(kind, error, trace)

    def add(self, arrays: Sequence[Any]) -> None:
        arrays = [pa.array(array, field.type) for array, field in zip(arrays, self._schema, strict=True)]
        self._pending.append(pa.RecordBatch.from_arrays(arrays, schema=self._schema))
        self._num_pending += len(arrays[0])
        self.num_rows += len(arrays[0])
        self._flush(at_least=self._batch_rows)

    def told(self) -> dict[str, Any]:
        """What a reader needs: size, rows, and [start, stop, CRC-32] of every batch and of what is around them."""
        sums = {"batches": self._batches, "edges": self._edges}
        return {"num_bytes": self._file.position, "num_rows": self.num_rows} | sums

    def _sum_up(self) -> tuple[int, int, int]:
        """Where what was written since the last call begins and ends, and its CRC-32."""
        summed = self._summed, self._file.position, self._file.sum
        self._summed, self._file.sum = self._file.position, 0
        return summed

    def _flush(self, *, at_least: int) -> None:
        if self._num_pending < at_least:
            return
        table = pa.Table.from_batches(self._pending)
        start = 0
        while self._num_pending - start >= at_least:
            piece = table.slice(start, self._batch_rows).combine_chunks()
            self._writer.write_batch(piece.to_batches()[0])
            self._batches.append(self._sum_up())
            start += len(piece)
        rest = table.slice(start).combine_chunks()
        self._pending, self._num_pending = rest.to_batches(), len(rest)


class _Batches:
    """A mapped Arrow IPC file of `_TableWriter`; each batch is checked when it is first asked for."""

    def __init__(self, path: Path, told: Mapping[str, Any]) -> None:
        self._path = path
        self._told = told["batches"]
        self.count, self.num_rows = len(self._told), int(told["num_rows"])
        with open(path, "rb") as file:
            self._bytes = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        if len(self._bytes) != told["num_bytes"]:
            raise DataError(f"{path}: has {len(self._bytes)} bytes, not {told['num_bytes']}. {AGAIN}")
        for edge in told["edges"]:
            self._check(*edge)
        self._reader = pa.ipc.open_file(pa.memory_map(str(path)))
        if self._reader.num_record_batches != self.count:
            raise DataError(f"{path}: has {self._reader.num_record_batches} batches, not {self.count}. {AGAIN}")
        self._batch: list[pa.RecordBatch | None] = [None] * self.count

    def batch(self, number: int, *, again: bool = False) -> pa.RecordBatch:
        """Args: again: check it even if it was checked before. Raises: DataError: other bytes than were written."""
        found = self._batch[number]
        if found is None or again:
            self._check(*self._told[number])
            found = self._batch[number] = self._reader.get_batch(number)
        return found

    def _check(self, begin: int, stop: int, checksum: int) -> None:
        with memoryview(self._bytes) as view, view[begin:stop] as piece:
            if crc32(piece) != checksum:
                raise DataError(f"{self._path}: bytes {begin}-{stop} are not what was written. {AGAIN}")

    def unchecked(self, number: int) -> pa.RecordBatch:
        """For whoever sees by other means whether what it uses is whole."""
        return self._reader.get_batch(number)

    def take(self, rows: Ints, num_rows: int, columns: Sequence[str]) -> pa.RecordBatch:
        if len(rows) and (rows.min() < 0 or rows.max() >= num_rows):
            raise IndexError(f"{self._path}: rows {rows.min()} to {rows.max()} of {num_rows}")
        numbers, names = rows // BATCH_ROWS, list(columns)
        parts, places = [], []
        for number in np.unique(numbers).tolist():
            mine = np.flatnonzero(numbers == number)
            parts.append(self.batch(number).select(names).take(pa.array(rows[mine] % BATCH_ROWS)))
            places.append(mine)
        if not parts:
            return pa.RecordBatch.from_pylist([], schema=pa.schema([self._reader.schema.field(name) for name in names]))
        if len(parts) == 1:
            return parts[0]
        order = np.empty(len(rows), np.int64)
        order[np.concatenate(places)] = np.arange(len(rows))
        joined: pa.RecordBatch = pa.Table.from_batches(parts).combine_chunks().to_batches()[0]
        return joined.take(pa.array(order))
