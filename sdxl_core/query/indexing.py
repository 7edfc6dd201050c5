"""Writing the files of an index, chunk of records by chunk of records: nothing of it is held in memory or mapped.

Records are sorted by tag within a chunk and set aside; then the chunks' runs are merged, a range of tags at a time.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from sdxl_core.catalog.mapped import write_arrow
from sdxl_core.catalog.records import Catalog
from sdxl_core.errors import DataError
from sdxl_core.progress import Progress
from sdxl_core.query.names import TagNames
from sdxl_core.query.select import Ints, Mask

FREQUENT = 32  # one record in this many: from there on a bitmap is smaller than a list of uint32
RANGE = 1 << 22  # entries of lists that are merged at a time
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
FLAGS = (*(f"known_{name}" for name in NUMBERS if name != "rating"), *(f"has_{name}" for name in PRESENT))


def write_index(catalog: Catalog, folder: Path, progress: Progress) -> list[str]:
    """All files of an index but index.json. Returns the file endings whose numbers stand in ending.npy.

    Raises: DataError: the catalog is damaged.   OSError.
    """
    counts = catalog.vocabulary["count"].to_numpy()
    frequent = np.flatnonzero(counts > catalog.num_records // FREQUENT)
    rows = np.full(len(counts), -1, np.int32)
    rows[frequent] = np.arange(len(frequent))
    starts = np.zeros(len(counts) + 1, np.int64)
    np.cumsum(np.where(rows >= 0, 0, counts), out=starts[1:])
    _write_names(catalog, folder, starts=starts, bitmap_rows=rows)
    endings = _Codes()
    with _Lists(folder, rows, starts) as lists, _Bits(folder, rows, len(frequent), catalog.num_records) as bits:
        with _columns(folder, catalog.num_records) as columns:
            for chunk in catalog.chunks(list(dict.fromkeys([*_STORED, *PRESENT, "key_hash"]))):
                lists.add(chunk.table["tags"], chunk.start)
                bits.add(chunk.table["tags"], _write_numbers(chunk.table, columns))
                columns["key_hash"].write(chunk.table["key_hash"].to_numpy().data)
                columns["ending"].write(endings.of(chunk.table["image"]).data)
                progress("index", chunk.start + chunk.table.num_rows, catalog.num_records)
        if not lists.merge():
            raise DataError(
                f"{catalog.path}: the counts of its tags are not those of its pictures. Build the catalog again in "
                f"another folder."
            )
    return endings.words


_STORED = tuple(name for name in NUMBERS if name != "tagcount")


def _write_names(catalog: Catalog, folder: Path, **tags: Ints) -> None:
    names = TagNames.of(catalog.vocabulary)
    write_arrow(folder / "names.arrow", pa.RecordBatch.from_arrays([names.names], names=["name"]))
    of_names = {"name_starts": names.starts, "name_ids": names.ids, "name_counts": names.counts}
    for name, array in (of_names | tags).items():
        np.save(folder / f"{name}.npy", array)


def _write_numbers(table: pa.RecordBatch, columns: Mapping[str, BinaryIO]) -> Mask:
    """Numbers into their columns; returns the flags, [len(FLAGS), num_rows]."""
    flags = []
    for name, dtype in NUMBERS.items():
        column = table["tags"].value_lengths() if name == "tagcount" else table[name]
        columns[name].write(column.fill_null(0).to_numpy(zero_copy_only=False).astype(dtype).data)
        if name != "rating":
            flags.append(np.asarray(column.is_valid()))
    return np.stack([*flags, *(np.asarray(table[name].is_valid()) for name in PRESENT)])


@contextmanager
def _columns(folder: Path, num_records: int) -> Iterator[dict[str, BinaryIO]]:
    with ExitStack() as stack:
        yield {
            name: stack.enter_context(_new(folder / f"{name}.npy", (num_records,), dtype))
            for name, dtype in {**NUMBERS, "ending": np.int32, "key_hash": np.uint64}.items()
        }


def _new(path: Path, shape: tuple[int, ...], dtype: Any) -> BinaryIO:
    """A .npy file whose content is still to be written. A full disk is told at once."""
    file = open(path, "wb")  # noqa: SIM115
    header = {"descr": np.dtype(dtype).str, "fortran_order": False, "shape": shape}
    np.lib.format.write_array_header_1_0(file, header)
    file.flush()
    size = int(np.prod(shape)) * np.dtype(dtype).itemsize
    if size:
        os.posix_fallocate(file.fileno(), file.tell(), size)
    return file


class _Lists:
    """postings.npy: the records of each tag that is not frequent, `starts[tag]:starts[tag + 1]`."""

    def __init__(self, folder: Path, bitmap_rows: Ints, starts: Ints) -> None:
        self._is_listed, self._starts, self._path = bitmap_rows < 0, starts, folder / "postings.npy"
        marks = np.arange(0, starts[-1] + RANGE, RANGE)  # a range of tags has about so many entries
        self._bounds = np.unique(np.append(np.searchsorted(starts, marks[:-1], "right") - 1, len(starts) - 1))
        self._runs: list[tuple[Ints, Ints]] = []  # of each chunk: where each range begins in the files below

    def __enter__(self) -> _Lists:
        names = ("run_records", "run_tags", "run_lengths")
        self._files = [open(self._path.with_name(f"{name}.partial"), "wb+") for name in names]  # noqa: SIM115
        return self

    def __exit__(self, *error: object) -> None:
        for file in self._files:
            file.close()
            Path(file.name).unlink(missing_ok=True)

    def add(self, lists: pa.ListArray, start: int) -> None:
        """Set aside a chunk's records, sorted by tag. `start`: number of the first."""
        offsets = np.asarray(lists.offsets)
        tags = lists.values.to_numpy()[offsets[0] : offsets[-1]].astype(np.uint64)
        records = np.arange(start, start + len(lists), dtype=np.uint64)
        pairs = (tags << np.uint64(32)) | np.repeat(records, np.diff(offsets))
        pairs = np.sort(pairs[self._is_listed[tags]])
        tags = (pairs >> np.uint64(32)).astype(np.uint32)
        first = np.flatnonzero(np.concatenate([[True], tags[1:] != tags[:-1]])) if len(tags) else np.zeros(0, np.int64)
        lengths = np.diff(np.append(first, len(tags)))
        ranges = np.searchsorted(tags[first], self._bounds)
        in_tags = ranges + self._files[1].tell() // 4
        in_records = np.append(first, len(tags))[ranges] + self._files[0].tell() // 4
        self._runs.append((in_records, in_tags))
        for file, column in zip(self._files, (pairs.astype(np.uint32), tags[first], lengths), strict=True):
            file.write(column.astype(np.uint32).data)

    def merge(self) -> bool:
        """Write the lists, a range of tags after the other. False: the records are not as many as `starts` says."""
        for file in self._files:
            file.flush()
        with _new(self._path, (int(self._starts[-1]),), np.uint32) as out:
            for number, (low, high) in enumerate(zip(self._bounds, self._bounds[1:], strict=False)):
                begin = self._starts[low:high] - self._starts[low]
                cursor, merged = begin.copy(), np.empty(int(self._starts[high] - self._starts[low]), np.uint32)
                for in_records, in_tags in self._runs:
                    records = self._read(0, in_records[number : number + 2])
                    tags = self._read(1, in_tags[number : number + 2]) - np.uint32(low)
                    lengths = self._read(2, in_tags[number : number + 2]).astype(np.int64)
                    places = cursor[tags] - (np.cumsum(lengths) - lengths)
                    places = np.repeat(places, lengths) + np.arange(len(records))
                    if len(places) and places.max() >= len(merged):
                        return False
                    merged[places] = records
                    cursor[tags] += lengths
                if (cursor != self._starts[low + 1 : high + 1] - self._starts[low]).any():
                    return False
                out.write(merged.data)
        return True

    def _read(self, file: int, bounds: Ints) -> Ints:
        begin, end = bounds.tolist()
        return np.fromfile(self._files[file].name, np.uint32, end - begin, offset=begin * 4)


class _Bits:
    """bitmaps.npy, a row a frequent tag, and a file a flag: one bit a record."""

    def __init__(self, folder: Path, bitmap_rows: Ints, num_rows: int, num_records: int) -> None:
        self._rows, self._num_rows, self._num_records = bitmap_rows, num_rows, num_records
        self._folder, self._num_bytes = folder, (num_records + 7) // 8
        self._tail = np.zeros((num_rows + len(FLAGS), 0), bool)
        self._done = 0  # records that are written

    def __enter__(self) -> _Bits:
        self._bitmaps = _new(self._folder / "bitmaps.npy", (self._num_rows, self._num_bytes), np.uint8)
        self._begin = self._bitmaps.tell()
        self._flags = [_new(self._folder / f"{name}.npy", (self._num_bytes,), np.uint8) for name in FLAGS]
        return self

    def __exit__(self, *error: object) -> None:
        for file in (self._bitmaps, *self._flags):
            file.close()

    def add(self, lists: pa.ListArray, flags: Mask) -> None:
        """Write the next records. Whole bytes: what is left waits for the next chunk."""
        rows = np.concatenate([_membership(lists, self._rows, self._num_rows), flags])
        rows = np.concatenate([self._tail, rows], axis=1)
        is_last = self._done + rows.shape[1] == self._num_records
        count = rows.shape[1] if is_last else rows.shape[1] // 8 * 8
        packed = np.packbits(rows[:, :count], axis=1)
        for row in range(self._num_rows):
            place = self._begin + row * self._num_bytes + self._done // 8
            os.pwrite(self._bitmaps.fileno(), packed[row].data, place)
        for file, bits in zip(self._flags, packed[self._num_rows :], strict=True):
            file.write(bits.data)
        self._tail, self._done = rows[:, count:], self._done + count


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
