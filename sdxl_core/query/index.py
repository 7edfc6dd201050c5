"""The index of a catalog: for every tag the records that have it, and the numbers, each in one flat file.

    index/DIGEST/index.json      written last: the sizes of the files below; without it, or with another size, no index
    postings.npy                 records (uint32, ascending) of one tag after the other, of tags that are not frequent
    bitmaps.npy                  one bit a record (uint8), a row a frequent tag (over one record in 32)
    names.arrow, *.npy           the names, where each tag's records begin, the numbers of all records

Everything is memory-mapped: a query reads what it names.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import orjson
import pyarrow as pa
import pyarrow.compute as pc

from sdxl_core.catalog.mapped import open_arrow, write_arrow
from sdxl_core.catalog.records import Catalog
from sdxl_core.errors import DataError
from sdxl_core.files import disk_errors, sync_files, sync_folder, write_atomic
from sdxl_core.lock import output_lock
from sdxl_core.progress import Progress, no_progress
from sdxl_core.query.expressions import Expression, FileType, Has, Query, Range, Rating, Source, Tag, Values, Wildcard
from sdxl_core.query.names import TagNames
from sdxl_core.query.select import (
    Ints,
    Mask,
    Selection,
    evaluate,
    has_prefix,
    is_any,
    narrowed,
    numbers_meet,
    stored_columns,
)

FORMAT = 2
FREQUENT = 32  # one record in this many: from there on a bitmap is smaller than a list of uint32
BLOCK = 1 << 17  # records, or entries of lists, that are worked on at a time
LONG = 64  # entries from which on a list is worth a step of its own
NUMBERS = {
    "id": np.int64,
    "score": np.int32,
    "fav_count": np.int32,
    "width": np.int32,
    "height": np.int32,
    "num_bytes": np.int64,
    "tagcount": np.int32,
    "rating": np.uint8,
}
PRESENT = ("tags", "caption", "image")


class Index:
    """An index on disk, opened. `Conditions` for `evaluate`: masks are packed, eight records a byte (np.packbits)."""

    def __init__(self, catalog: Catalog, folder: Path) -> None:
        self.num_records = catalog.num_records
        self._num_bytes = (catalog.num_records + 7) // 8
        self._catalog, self._folder = catalog, folder

    def select(self, query: Query) -> Selection:
        """The records that a query picks."""
        records = self._records(evaluate(query.where, self))
        return narrowed(query, records, lambda some: self._file("key_hash")[some])

    def everything(self) -> Ints:
        return np.full(self._num_bytes, 255, np.uint8)

    def meet(self, condition: Expression) -> Ints:
        """Which records meet a condition."""
        if condition == Wildcard("*"):  # every tag's list would be the slowest way
            return self._of_numbers(Range("tagcount", 1, None))
        if isinstance(condition, Tag | Wildcard):
            return self._with_any(self.names.ids_of(condition))
        if isinstance(condition, Range | Values):
            return self._of_numbers(condition)
        if isinstance(condition, Rating):
            return self._in_blocks(lambda window: is_any(self._file("rating")[window], condition.codes))
        if isinstance(condition, Has):
            return self._file(f"has_{condition.what}")
        if isinstance(condition, FileType):
            codes = [code for code, ending in enumerate(self._endings) if ending in condition.endings]
            return self._in_blocks(lambda window: is_any(self._file("ending")[window], codes))
        if isinstance(condition, Source):  # keys are not indexed
            chunks = self._catalog.chunks(["key"])
            return np.packbits(np.concatenate([has_prefix(chunk.table["key"], condition.prefixes) for chunk in chunks]))
        raise TypeError(condition)

    def count(self, mask: Ints) -> int:
        behind = (-self.num_records) % 8
        count = int(np.bitwise_count(mask).sum(dtype=np.int64))
        return count - (int(mask[-1]) & ((1 << behind) - 1)).bit_count() if behind else count

    @cached_property
    def names(self) -> TagNames:
        """The catalog's tags by name."""
        stored = open_arrow(self._folder / "names.arrow")["name"]
        return TagNames(stored, self._file("name_starts"), self._file("name_ids"), self._file("name_counts"))

    def _records(self, mask: Ints) -> Ints:
        """The numbers of a mask's records, ascending (int64)."""
        records, done = np.empty(self.count(mask), np.int64), 0
        for start in range(0, self.num_records, BLOCK):
            stop = min(start + BLOCK, self.num_records)
            found = np.flatnonzero(np.unpackbits(mask[start // 8 : (stop + 7) // 8], count=stop - start).view(bool))
            np.add(found, start, out=records[done : done + len(found)])
            done += len(found)
        return records

    def _with_any(self, ids: Ints) -> Ints:
        rows = self._file("bitmap_rows")[ids]
        mask = self._listed(ids[rows < 0])
        for row in rows[rows >= 0].tolist():
            mask |= self._file("bitmaps")[row]
        return mask

    def _listed(self, ids: Ints) -> Ints:
        """Records that have one of some tags that have lists; unpacked meanwhile, a byte a record."""
        if not len(ids):
            return np.zeros(self._num_bytes, np.uint8)
        mask = np.zeros(self.num_records, bool)
        begin, end = self._file("starts")[ids], self._file("starts")[ids + 1]
        is_long = end - begin >= LONG
        postings = self._file("postings")
        for start, stop in zip(begin[is_long].tolist(), end[is_long].tolist(), strict=True):
            mask[postings[start:stop]] = True
        begin, lengths = begin[~is_long], (end - begin)[~is_long]
        for some in range(0, len(begin), BLOCK // LONG):  # many short lists at a time
            window = slice(some, some + BLOCK // LONG)
            behind = np.cumsum(lengths[window])
            places = np.arange(behind[-1]) + np.repeat(begin[window] - behind + lengths[window], lengths[window])
            mask[postings[places]] = True
        return np.packbits(mask)

    def _of_numbers(self, condition: Range | Values) -> Ints:
        """Records whose numbers meet a condition."""
        mask = self._in_blocks(lambda window: numbers_meet(condition, lambda column: self._file(column)[window]))
        for column in stored_columns(condition):
            mask &= self._file(f"known_{column}")
        return mask

    def _in_blocks(self, met: Callable[[slice], Mask]) -> Ints:
        """The mask of truth values that are made for a block of records at a time, so that they stay in the caches."""
        mask = np.empty(self._num_bytes, np.uint8)
        for start in range(0, self.num_records, BLOCK):
            stop = min(start + BLOCK, self.num_records)
            mask[start // 8 : (stop + 7) // 8] = np.packbits(met(slice(start, stop)))
        return mask

    def _file(self, name: str) -> Ints:
        if name not in self._open:
            stored = np.load(self._folder / f"{name}.npy", mmap_mode="r", allow_pickle=False)
            self._open[name] = np.asarray(stored)  # np.memmap's own slices are slow
        return self._open[name]

    @cached_property
    def _open(self) -> dict[str, Ints]:
        return {}

    @cached_property
    def _endings(self) -> list[str]:
        endings: list[str] = orjson.loads((self._folder / "index.json").read_bytes())["endings"]
        return endings


def open_index(catalog: Catalog) -> Index | None:
    """The index of exactly this state of the catalog, None where there is none, or not all of it."""
    folder = _folder(catalog)
    try:
        stored = orjson.loads((folder / "index.json").read_bytes())
        if stored["format"] != FORMAT or any(
            (folder / name).stat().st_size != size for name, size in stored["sizes"].items()
        ):
            return None
    except (OSError, orjson.JSONDecodeError, KeyError):
        return None
    return Index(catalog, folder)


def build_index(catalog: Catalog, *, progress: Progress = no_progress) -> Index:
    """Make the index of a catalog, unless it is there. Memory: a chunk of the catalog, and 16 bytes a tag.

    Raises: LockedError: another process makes it just now.   DataError: the catalog is damaged.   DiskFullError.
    """
    folder = _folder(catalog)
    with output_lock(catalog.path, purpose="indexes a catalog"):
        there = open_index(catalog)
        if there is not None:
            return there
        shutil.rmtree(folder.parent, ignore_errors=True)  # of earlier states, or not finished
        with disk_errors(folder):
            folder.mkdir(parents=True)
            endings = _Builder(catalog, folder).build(progress)
        files = sorted(folder.iterdir())
        sync_files(files)
        sizes = {file.name: file.stat().st_size for file in files}
        write_atomic(folder / "index.json", orjson.dumps({"format": FORMAT, "sizes": sizes, "endings": endings}))
        sync_folder(folder.parent)
    return Index(catalog, folder)


class _Builder:
    """Writes the files of an index, chunk of records by chunk of records."""

    def __init__(self, catalog: Catalog, folder: Path) -> None:
        self._catalog, self._folder = catalog, folder
        counts = catalog.vocabulary["count"].to_numpy()
        self._frequent = np.flatnonzero(counts > catalog.num_records // FREQUENT)
        self._rows = np.full(len(counts), -1, np.int32)
        self._rows[self._frequent] = np.arange(len(self._frequent))
        listed = np.where(self._rows >= 0, 0, counts)
        self._starts = np.zeros(len(counts) + 1, np.int64)
        np.cumsum(listed, out=self._starts[1:])

    def build(self, progress: Progress) -> list[str]:
        """All files but index.json. Returns the file endings whose numbers stand in ending.npy."""
        self._write_names()
        num_records, num_bytes = self._catalog.num_records, (self._catalog.num_records + 7) // 8
        endings = _Codes()
        with (
            self._new("postings", (int(self._starts[-1]),), np.uint32) as postings,
            self._new("bitmaps", (len(self._frequent), num_bytes), np.uint8) as bitmaps,
            self._columns(num_records) as columns,
        ):
            cursor = self._starts[:-1].copy()
            tail = np.zeros((len(self._frequent) + len(self._flags), 0), bool)
            done = 0
            numbers = [name for name in NUMBERS if name != "tagcount"]
            for chunk in self._catalog.chunks(list(dict.fromkeys([*numbers, *PRESENT, "key_hash"]))):
                table, stop = chunk.table, chunk.start + chunk.table.num_rows
                window = slice(chunk.start, stop)
                self._write_postings(table["tags"], chunk.start, postings, cursor)
                columns["key_hash"][window] = table["key_hash"].to_numpy()
                columns["ending"][window] = endings.of(table["image"])
                flags = self._write_numbers(table, window, columns)
                rows = np.concatenate([_membership(table["tags"], self._rows, len(self._frequent)), flags])
                rows = np.concatenate([tail, rows], axis=1)
                tail = self._write_bits(rows, done, bitmaps, columns, last=stop == num_records)
                done = stop - tail.shape[1]
                progress("index", stop, num_records)
            if (cursor != self._starts[1:]).any():
                raise DataError(
                    f"{self._catalog.path}: the counts of its tags are not those of its pictures. Build the catalog "
                    f"again in another folder."
                )
        return endings.words

    def _write_names(self) -> None:
        names = TagNames.of(self._catalog.vocabulary)
        batch = pa.RecordBatch.from_arrays([names.names], names=["name"])
        write_arrow(self._folder / "names.arrow", batch)
        for name, array in (
            ("name_starts", names.starts),
            ("name_ids", names.ids),
            ("name_counts", names.counts),
            ("starts", self._starts),
            ("bitmap_rows", self._rows),
        ):
            np.save(self._folder / f"{name}.npy", array)

    def _write_postings(self, lists: pa.ListArray, start: int, postings: Ints, cursor: Ints) -> None:
        """Append the chunk's records behind the earlier ones of each of its tags."""
        offsets = np.asarray(lists.offsets)
        tags = lists.values.to_numpy()[offsets[0] : offsets[-1]].astype(np.uint64)
        records = np.arange(start, start + len(lists), dtype=np.uint64)
        pairs = (tags << np.uint64(32)) | np.repeat(records, np.diff(offsets))
        pairs = np.sort(pairs[self._rows[tags] < 0])
        tags = (pairs >> np.uint64(32)).astype(np.int64)
        first = np.flatnonzero(np.concatenate([[True], tags[1:] != tags[:-1]])) if len(tags) else np.zeros(0, np.int64)
        lengths = np.diff(np.append(first, len(tags)))
        within = np.arange(len(tags)) - np.repeat(first, lengths)
        postings[cursor[tags] + within] = (pairs & np.uint64(0xFFFFFFFF)).astype(np.uint32)
        cursor[tags[first]] += lengths

    @property
    def _flags(self) -> list[str]:
        return [f"known_{name}" for name in NUMBERS if name != "rating"] + [f"has_{name}" for name in PRESENT]

    def _write_numbers(self, table: pa.RecordBatch, window: slice, columns: dict[str, Ints]) -> Mask:
        """Numbers into their columns; returns the flags, [len(_flags), num_rows]."""
        flags = []
        for name, dtype in NUMBERS.items():
            column = table["tags"].value_lengths() if name == "tagcount" else table[name]
            columns[name][window] = column.fill_null(0).to_numpy(zero_copy_only=False).astype(dtype)
            if name != "rating":
                flags.append(np.asarray(column.is_valid()))
        return np.stack([*flags, *(np.asarray(table[name].is_valid()) for name in PRESENT)])

    def _write_bits(self, rows: Mask, start: int, bitmaps: Ints, columns: dict[str, Ints], *, last: bool) -> Mask:
        """Pack whole bytes of every row, from record `start` on; returns what is left for the next chunk."""
        count = rows.shape[1] if last else rows.shape[1] // 8 * 8
        packed = np.packbits(rows[:, :count], axis=1)
        window = slice(start // 8, start // 8 + packed.shape[1])
        bitmaps[:, window] = packed[: len(self._frequent)]
        for name, bits in zip(self._flags, packed[len(self._frequent) :], strict=True):
            columns[name][window] = bits
        return rows[:, count:]

    @contextmanager
    def _columns(self, num_records: int) -> Iterator[dict[str, Ints]]:
        shapes: dict[str, tuple[int, Any]] = {name: (num_records, dtype) for name, dtype in NUMBERS.items()}
        shapes |= {"ending": (num_records, np.int32), "key_hash": (num_records, np.uint64)}
        shapes |= dict.fromkeys(self._flags, ((num_records + 7) // 8, np.uint8))
        opened = {name: self._open_new(name, (size,), dtype) for name, (size, dtype) in shapes.items()}
        yield opened
        for array in opened.values():
            if isinstance(array, np.memmap):
                array.flush()

    @contextmanager
    def _new(self, name: str, shape: tuple[int, ...], dtype: Any) -> Iterator[Ints]:
        array = self._open_new(name, shape, dtype)
        yield array
        if isinstance(array, np.memmap):
            array.flush()

    def _open_new(self, name: str, shape: tuple[int, ...], dtype: Any) -> Ints:
        path = self._folder / f"{name}.npy"
        if not np.prod(shape):  # nothing can be mapped
            array = np.zeros(shape, dtype)
            np.save(path, array)
            return array
        array = np.lib.format.open_memmap(path, mode="w+", dtype=dtype, shape=shape)
        with open(path, "rb+") as file:  # a full disk is told here, not by a fault in the middle
            os.posix_fallocate(file.fileno(), 0, os.fstat(file.fileno()).st_size)
        return array


class _Codes:
    """Numbers for file endings, as they come; 0: no ending."""

    def __init__(self) -> None:
        self.words = [""]

    def of(self, images: pa.StringArray) -> Ints:
        endings = pc.extract_regex(pc.utf8_lower(images), r"\.(?P<ending>[^.]*)$").field("ending")
        encoded = endings.fill_null("").dictionary_encode()
        found = encoded.dictionary.to_pylist()
        self.words += sorted(set(found) - set(self.words))
        codes = np.asarray([self.words.index(ending) for ending in found], np.int32)
        numbers: Ints = codes[np.asarray(encoded.indices)]
        return numbers


def _membership(lists: pa.ListArray, rows: Ints, num_rows: int) -> Mask:
    """Which records of the chunk have each frequent tag, [num_rows, num_records]."""
    offsets = np.asarray(lists.offsets)
    row = rows[lists.values.to_numpy()[offsets[0] : offsets[-1]]]
    record = np.repeat(np.arange(len(lists)), np.diff(offsets))
    mask = np.zeros((num_rows, len(lists)), bool)
    mask[row[row >= 0], record[row >= 0]] = True
    return mask


def _folder(catalog: Catalog) -> Path:
    return catalog.path / "index" / catalog.digest[:32]
