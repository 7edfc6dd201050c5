"""Reading a catalog: one record a picture, by columns, in memory shared by all processes."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple, Self

import numpy as np
import orjson
import pyarrow as pa

from sdxl_core.catalog.config import CatalogSource, Sizes
from sdxl_core.catalog.join import GROUPS, gather, part_starts
from sdxl_core.catalog.mapped import Mapped, map_arrow
from sdxl_core.catalog.parts import Part, sizes_path
from sdxl_core.catalog.schema import FORMAT, SIZES, TAGS
from sdxl_core.errors import ConfigError, DataError
from sdxl_core.files import digest_of

Ints = np.ndarray[Any, np.dtype[Any]]
MANIFEST = "catalog.json"
CHUNK_RECORDS = 65_536
_GROUP_OF = {column: group for group, columns in GROUPS.items() for column in columns}


class Chunk(NamedTuple):
    """Consecutive records. `start`: number of the first. `table`: the columns asked for; `tags` are global tag ids."""

    start: int
    table: pa.RecordBatch


@dataclass(frozen=True)
class Catalog:
    """A finished catalog. Nothing is held but what is looked at; forked and other processes share the pages.

    `digest`: identity of the content: sources, parts and their order.   `sizes`: whether headers are read, `sizes.py`.
    """

    path: Path
    digest: str
    sources: tuple[CatalogSource, ...]
    parts: tuple[Part, ...]
    part_sources: tuple[int, ...]
    num_records: int
    joined: str
    has_pointers: bool
    sizes: Sizes

    @classmethod
    def open(cls, path: Path) -> Self:
        """Raises: ConfigError: no catalog there.   DataError: it is damaged, or of another version."""
        try:
            stored = orjson.loads((path / MANIFEST).read_bytes())
            if stored["format"] != FORMAT:
                raise DataError(
                    f"{path}: a catalog of format {stored['format']}; this version reads format {FORMAT}. Build it "
                    f"again with `sdxl-flows catalog` in another folder."
                )
            return cls(
                path=path,
                digest=stored["digest"],
                sources=tuple(CatalogSource.model_validate(source) for source in stored["sources"]),
                parts=tuple(Part(path / "parts" / part["digest"]) for part in stored["parts"]),
                part_sources=tuple(part["source"] for part in stored["parts"]),
                num_records=stored["num_records"],
                joined=stored["joined"],
                has_pointers=stored["has_pointers"],
                sizes=stored.get("sizes", "auto"),  # not told by a catalog that was made before there was a choice
            )
        except (FileNotFoundError, NotADirectoryError) as error:
            raise ConfigError(
                f"{path}: there is no catalog. `sdxl-flows catalog --source S --out {path}` makes one."
            ) from error
        except (orjson.JSONDecodeError, KeyError, TypeError, ValueError) as error:
            raise DataError(f"{path / MANIFEST}: damaged ({error}). Build the catalog again.") from error

    @property
    def knows_pictures(self) -> bool:
        """Whether any source has pictures; a dump of metadata alone describes them without."""
        kinds = {source.kind for source in self.sources if "images" in source.use}
        return not kinds.isdisjoint({"folder", "tars"})

    @cached_property
    def vocabulary(self) -> pa.RecordBatch:
        """All tags, `schema.VOCABULARY`; the row number is the tag's id. `count`: records that have it."""
        return map_arrow(joined_path(self.path, self.joined, "vocabulary")).batch

    def chunks(self, columns: Sequence[str], *, start: int = 0, stop: int | None = None) -> Iterator[Chunk]:
        """Records [start, stop) in order, at most CHUNK_RECORDS at a time.

        Args:   columns: of `schema.ROWS`, and `source`: position in `sources` of what the picture's bytes (else its
                first row) come from; `tags_source`, `caption_source`: what the words come from, null: there are none.
        """
        stop = self.num_records if stop is None else min(stop, self.num_records)
        while start < stop:
            end = min(stop, start + CHUNK_RECORDS)
            if not self.has_pointers:  # a chunk within one part is a view of the file
                part = int(np.searchsorted(self.part_starts, start, "right")) - 1
                end = min(end, int(self.part_starts[part + 1]))
            yield Chunk(start, self.take(np.arange(start, end), columns))
            if self.has_pointers:
                self.forget()
            else:
                self.parts[part].forget()
            start = end

    def forget(self) -> None:
        """Give back the pages read so far: whoever passes over many records with `take` calls it now and then."""
        for part in self.parts:
            part.forget()
        for mapped in self._joined.values():
            mapped.forget()

    def take(self, records: Ints, columns: Sequence[str]) -> pa.RecordBatch:
        """The columns of the given records, in the order given."""
        arrays = [self._column(name, records) for name in columns]
        return pa.RecordBatch.from_arrays(arrays, names=list(columns))

    def _column(self, name: str, records: Ints) -> pa.Array:
        if name == "source":
            image, first = self._rows("image", records), self._rows("first", records)
            part = np.searchsorted(self.part_starts, np.where(image >= 0, image, first), "right") - 1
            return pa.array(np.asarray(self.part_sources, np.int32)[part])
        if name in ("tags_source", "caption_source"):
            rows = self._rows(name.partition("_")[0], records)
            part = np.searchsorted(self.part_starts, rows, "right") - 1
            return pa.array(np.asarray(self.part_sources, np.int32)[part], mask=rows < 0)
        rows = self._rows(_GROUP_OF.get(name, "first"), records)
        if name == "tags":
            return self._tags(rows)
        values = self._values(rows, name)
        return self._with_read(values, name, records) if name in SIZES.names and self.read_state else values

    @cached_property
    def read_state(self) -> str:
        """Changes whenever sizes are read from headers; "" where none ever were."""
        files = {}
        for part in self.parts:
            with suppress(FileNotFoundError):
                files[part.path.name] = sizes_path(part.path).stat().st_mtime_ns
        return digest_of(orjson.dumps(files)) if files else ""

    def rows_without_size(self, records: Ints) -> Ints:
        """For each record the row of its picture, numbered over all parts; -1 where it has none, or a source tells its
        size."""
        facts = self._rows(_GROUP_OF["width"], records)
        told = [np.asarray(self._values(facts, name).is_valid()) for name in SIZES.names]
        return np.where(told[0] & told[1], -1, self._rows("image", records))

    def _with_read(self, told: pa.Array, name: str, records: Ints) -> pa.Array:
        """Widths or heights that a source tells, and for other records those that were read from the header."""
        rows = self.rows_without_size(records)
        places = np.flatnonzero(rows >= 0)
        owners = np.searchsorted(self.part_starts, rows[places], "right") - 1
        values, is_known = np.array(told.fill_null(0)), np.array(told.is_valid())
        for number in np.unique(owners):
            sizes = self.parts[number].sizes
            if sizes is not None:
                own = places[owners == number]
                read = sizes[name].to_numpy()[rows[own] - self.part_starts[number]]
                values[own[read > 0]], is_known[own[read > 0]] = read[read > 0], True
        return pa.array(values, mask=~is_known)

    def _rows(self, group: str, records: Ints) -> Ints:
        if not self.has_pointers:
            return records
        rows: Ints = self._joined["pointers"].batch[group].to_numpy()[records].astype(np.int64)
        return rows

    def _values(self, rows: Ints, name: str) -> pa.Array:
        view = self._view(rows)
        if view is not None:
            part, begin = view
            return self.parts[part].rows[name].slice(begin, len(rows))
        return gather(self.parts, self.part_starts, rows, lambda part: part.rows[name])

    def _tags(self, rows: Ints) -> pa.ListArray:
        view = self._view(rows)
        if view is not None:
            part, begin = view
            return _translated(self.parts[part].rows["tags"].slice(begin, len(rows)), self._tag_maps[part])
        # where rows of several parts mix, the part's number goes with each tag
        numbers = {id(part): number for number, part in enumerate(self.parts)}
        return gather(
            self.parts,
            self.part_starts,
            rows,
            lambda part: _LazyTags(part.rows["tags"], self._tag_maps[numbers[id(part)]]),
        )

    def _view(self, rows: Ints) -> tuple[int, int] | None:
        """Part and first row in it, where the rows are consecutive within one part."""
        if not len(rows) or rows[0] < 0 or rows[-1] - rows[0] != len(rows) - 1 or (np.diff(rows) != 1).any():
            return None
        part = int(np.searchsorted(self.part_starts, rows[0], "right")) - 1
        return (part, int(rows[0] - self.part_starts[part])) if rows[-1] < self.part_starts[part + 1] else None

    @cached_property
    def part_starts(self) -> Ints:
        """As `join.part_starts`."""
        return part_starts(self.parts)

    @cached_property
    def _joined(self) -> dict[str, Mapped]:
        names = ("tag_map", "pointers") if self.has_pointers else ("tag_map",)
        return {name: map_arrow(joined_path(self.path, self.joined, name)) for name in names}

    @cached_property
    def _tag_maps(self) -> list[Ints]:
        """For each part: global id of each of its tags (uint32)."""
        lists = self._joined["tag_map"].batch["ids"]
        return [lists[number].values.to_numpy() for number in range(len(lists))]


@dataclass(frozen=True, slots=True)
class _LazyTags:
    """A part's tag lists whose ids are translated only for the rows that are taken."""

    lists: pa.ListArray
    ids: Ints

    @property
    def type(self) -> pa.DataType:
        return TAGS

    def take(self, rows: pa.Array) -> pa.ListArray:
        return _translated(self.lists.take(rows), self.ids)

    def slice(self, start: int, length: int) -> pa.ListArray:
        return self.lists.slice(start, length)


def is_catalog(path: Path) -> bool:
    """Whether a folder is a catalog, not a folder of pictures."""
    return (path / MANIFEST).is_file() and (path / "parts").is_dir()


def _translated(lists: pa.ListArray, ids: Ints) -> pa.ListArray:
    """The lists with every part-local tag replaced by its global id."""
    if not len(lists):
        return lists
    offsets = np.frombuffer(lists.buffers()[1], np.int32)[lists.offset : lists.offset + len(lists) + 1]
    values = lists.values.to_numpy()[offsets[0] : offsets[-1]]
    mask = lists.is_null() if lists.null_count else None
    return pa.ListArray.from_arrays(pa.array(offsets - offsets[0]), pa.array(ids[values]), type=TAGS, mask=mask)


def joined_path(catalog: Path, digest: str, what: str) -> Path:
    """File of `what` (vocabulary, tag_map, pointers) belonging to one state of the catalog."""
    return catalog / "joined" / f"{digest[:32]}.{what}.arrow"
