"""The index of a catalog: for every tag the records that have it, and the numbers, each in one flat file.

    index/DIGEST/index.json      written last: the sizes of the files below; without it, or with another size, no index
    postings.npy                 records (uint32, ascending) of one tag after the other, of tags that are not frequent
    bitmaps.npy                  one bit a record (uint8), a row a frequent tag (over one record in 32)
    names.arrow, *.npy           the names, where each tag's records begin, the numbers of all records

Everything is memory-mapped: a query reads what it names.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import orjson

from sdxl_core.catalog.mapped import open_arrow
from sdxl_core.catalog.records import Catalog
from sdxl_core.files import disk_errors, sync_files, sync_folder, write_atomic
from sdxl_core.lock import output_lock
from sdxl_core.progress import Progress, no_progress
from sdxl_core.query.expressions import (
    Expression,
    FileType,
    Has,
    Query,
    Range,
    Rating,
    Source,
    Tag,
    Values,
    Wildcard,
    asks_for_size,
)
from sdxl_core.query.indexing import write_index
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
    scan,
    stored_columns,
)

FORMAT = 2
BLOCK = 1 << 17  # records, or entries of lists, that are worked on at a time
LONG = 64  # entries from which on a list is worth a step of its own


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
    def knows_sizes(self) -> bool:
        """Whether no sizes were read from pictures since the index was made."""
        return bool(self._catalog.read_state == self._stored["read_state"])

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
        """Records whose numbers meet a condition; of sizes that were read after the index was made, by the catalog."""
        if asks_for_size(condition) and not self.knows_sizes:
            return np.packbits(np.concatenate([found.meet(condition) for _, found in scan(self._catalog, [condition])]))
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
        endings: list[str] = self._stored["endings"]
        return endings

    @cached_property
    def _stored(self) -> dict[str, Any]:
        stored: dict[str, Any] = orjson.loads((self._folder / "index.json").read_bytes())
        return {"read_state": "", **stored}  # not told by an index that was made before sizes were read


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
        if there is not None and there.knows_sizes:
            return there
        shutil.rmtree(folder.parent, ignore_errors=True)  # of earlier states, or not finished
        read_state = catalog.read_state
        with disk_errors(folder):
            folder.mkdir(parents=True)
            endings = write_index(catalog, folder, progress)
        files = sorted(folder.iterdir())
        sync_files(files)
        sizes = {file.name: file.stat().st_size for file in files}
        stored = {"format": FORMAT, "sizes": sizes, "endings": endings, "read_state": read_state}
        write_atomic(folder / "index.json", orjson.dumps(stored))
        sync_folder(folder.parent)
    return Index(catalog, folder)


def _folder(catalog: Catalog) -> Path:
    return catalog.path / "index" / catalog.digest[:32]
