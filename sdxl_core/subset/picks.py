"""The files that belong to records of a catalog."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa

from sdxl_core.catalog.records import CHUNK_RECORDS, Catalog
from sdxl_core.rejected import Rejected
from sdxl_core.subset import manifest
from sdxl_core.subset.wanted import Wanted, WantedGroup

Ints = np.ndarray[Any, np.dtype[Any]]
STAGE = "subset"
BATCH = 16_384
HALVES = ("image", "tags", "caption", "text")


@dataclass(slots=True)
class Halves:
    """What picked records lack. `counts`: by kind; `text` is neither tags nor caption."""

    counts: Counter[str] = field(default_factory=Counter)

    def add(self, table: pa.RecordBatch) -> None:
        has = {name: np.asarray(table[name].is_valid()) for name in ("image", "tags", "caption")}
        has["text"] = has["tags"] | has["caption"]
        for name in HALVES:
            self.counts[name] += int((~has[name]).sum())

    def told(self) -> dict[str, int]:
        return {name: self.counts[name] for name in HALVES}


class Batch(NamedTuple):
    """Some picked records. `has_image`: which of them have a picture."""

    records: Ints
    table: pa.RecordBatch
    has_image: np.ndarray[Any, np.dtype[np.bool_]]


def picked_batches(catalog: Catalog, records: Ints, columns: tuple[str, ...]) -> Iterator[Batch]:
    """Args: columns: besides key, image, tags, caption."""
    names = list(dict.fromkeys(("key", "image", "tags", "caption", *columns)))
    for start in range(0, len(records), BATCH):
        part = records[start : start + BATCH]
        table = catalog.take(part, names)
        yield Batch(part, table, np.asarray(table["image"].is_valid()))
        if start % CHUNK_RECORDS == 0:
            catalog.forget()


def manifest_rows(catalog: Catalog, records: Ints, halves: Halves) -> Iterator[pa.RecordBatch]:
    """Rows of `manifest.ROWS` of the records that have a picture."""
    for batch in picked_batches(catalog, records, ("tar", "offset", "num_bytes", "source")):
        halves.add(batch.table)
        columns = {"record": pa.array(batch.records), "root": batch.table["source"]}
        arrays = [columns[name] if name in columns else batch.table[name] for name in manifest.ROWS.names]
        rows = pa.RecordBatch.from_arrays(arrays, names=manifest.ROWS.names)
        keep_all = batch.has_image.all() or not catalog.knows_pictures
        yield (rows if keep_all else rows.filter(pa.array(batch.has_image))).cast(manifest.ROWS)


def without_image(catalog: Catalog, records: Ints) -> Iterator[Rejected]:
    """Texts without a picture: the records that nothing can be placed of. None where no source has pictures at all."""
    if not catalog.knows_pictures:
        return
    for batch in picked_batches(catalog, records, ()):
        for key in batch.table["key"].filter(pa.array(~batch.has_image)).to_pylist():
            yield Rejected(stage=STAGE, key=key, reason="no_image", detail="its words are known, but no source has it")


def without_text(catalog: Catalog, records: Ints) -> Iterator[Rejected]:
    """Pictures without a text: they are kept, and listed."""
    for batch in picked_batches(catalog, records, ()):
        lonely = np.asarray(batch.table["tags"].is_null()) & np.asarray(batch.table["caption"].is_null())
        for key in batch.table["key"].filter(pa.array(lonely & batch.has_image)).to_pylist():
            yield Rejected(stage=STAGE, key=key, reason="no_text", detail="kept; it has neither tags nor caption")


def wanted_groups(catalog: Catalog, records: Ints) -> Iterator[WantedGroup]:
    """The files of every record that has a picture, in the records' order.

    A text that stands in a file beside other pictures' (a folder source) is that file; of all other sources it is
    written from the catalog.
    """
    sources = [
        (os.path.join(source.path, ""), source.kind == "folder", source.key == "path", len(source.prefix))
        for source in catalog.sources
    ]
    columns = ("tar", "offset", "num_bytes", "raw_tags", "source", "tags_source", "caption_source")
    for batch in picked_batches(catalog, records, columns):
        rows = batch.table.select(["key", "image", "source", "tar", "offset", "num_bytes"]).to_pydict()
        texts = [_Texts(catalog, batch.table, kind) for kind in ("tags", "caption")]
        for number in np.flatnonzero(batch.has_image).tolist():
            key, image = rows["key"][number], rows["image"][number]
            root = sources[rows["source"][number]][0]
            tar = rows["tar"][number]
            name = key + os.path.splitext(image)[1]
            if tar is None:
                picture = Wanted(name, root + image)
            else:
                picture = Wanted(name, root + tar, rows["offset"][number], rows["num_bytes"][number])
            files: dict[str, Wanted] = {}
            for text in texts:
                source = text.sources[number]
                if source >= 0:
                    base, is_folder, by_path, prefix = sources[source]
                    extension = text.extensions[source]
                    if is_folder and source == rows["source"][number]:
                        file = Wanted(key + extension, base + os.path.splitext(image)[0] + extension)
                    elif is_folder and by_path:
                        file = Wanted(key + extension, base + key[prefix:] + extension)
                    else:
                        file = Wanted(key + extension, picture.path, text=text.content(number))
                    files.setdefault(file.name, file)
            yield WantedGroup(key, (*files.values(), picture))


class _Texts:
    """The tags' texts or the captions of a batch. `sources`: where each is from, -1: there is none."""

    def __init__(self, catalog: Catalog, table: pa.RecordBatch, kind: str) -> None:
        self.sources = np.where(table[kind].is_valid(), table[f"{kind}_source"].fill_null(-1), -1).tolist()
        self.extensions = [
            source.tag_extension if kind == "tags" else source.caption_extension for source in catalog.sources
        ]
        self._catalog, self._table, self._kind = catalog, table, kind

    def content(self, number: int) -> bytes:
        text = self._table["raw_tags" if self._kind == "tags" else "caption"][number].as_py()
        if text is None:
            ids = self._table["tags"][number].values
            text = ", ".join(self._catalog.vocabulary["tag"].take(ids).to_pylist())
        return str(text).encode()
