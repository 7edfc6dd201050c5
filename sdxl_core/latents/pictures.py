"""Where the pictures of a metadata JSON are: in a folder, in the folders and tars of a catalog or of a manifest."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from sdxl_core.catalog.records import Catalog, is_catalog
from sdxl_core.config import CacheLatentsConfig
from sdxl_core.dataset.listing import key_of, scan_images
from sdxl_core.errors import ConfigError, DataError
from sdxl_core.files import digest_of
from sdxl_core.latents.matching import NameTable
from sdxl_core.latents.rows import PLACES
from sdxl_core.subset.manifest import Manifest

Ints = np.ndarray[Any, np.dtype[Any]]
_SCHEMA = pa.schema(PLACES)


@dataclass(frozen=True)
class Pictures:
    """The pictures of a source, `rows.PLACES`, about 150 bytes each. `roots`: empty for a folder, the config's."""

    roots: tuple[Path, ...]
    places: pa.RecordBatch

    def find(self, names: Sequence[str]) -> Ints:
        """int64: position of the picture of each name (its key, or its path with extension), -1 where there is none."""
        found = self._by_key.find(names)
        missing = np.flatnonzero(found < 0)
        if len(missing):
            found[missing] = self._by_image.find([names[number] for number in missing.tolist()])
        return found

    def owners(self, positions: Ints) -> Ints:
        """int64: of each picture the first one of its name: 1.png and 1.jpg would share their latents."""
        return self._by_key.find(self.places["name"].take(pa.array(positions)))

    @cached_property
    def _by_key(self) -> NameTable:
        return NameTable(self.places["name"])

    @cached_property
    def _by_image(self) -> NameTable:
        return NameTable(self.places["image"])


@dataclass(frozen=True)
class PictureSource:
    """What a config names. `digest`: identity of all its pictures; of a folder it takes a look at each file."""

    config: CacheLatentsConfig

    @cached_property
    def digest(self) -> str:
        """Raises: as `pictures`."""
        if self.manifest is not None:
            status = self.manifest.path.stat()
            return digest_of("manifest", self.manifest.catalog_digest, status.st_size, status.st_mtime_ns)
        if self.catalog is not None:
            return digest_of("catalog", self.catalog.digest)
        places = self._of_folder
        return digest_of("folder", *(buffer.to_pybytes() for column in places for buffer in column.buffers() if buffer))

    def pictures(self) -> Pictures:
        """Raises: ConfigError: no such folder, catalog or manifest.   DataError: no picture in it; not readable."""
        if self.manifest is not None:
            return Pictures(self.manifest.roots, _joined(self._of_manifest(self.manifest)))
        if self.catalog is not None:
            roots = tuple(source.path for source in self.catalog.sources)
            return Pictures(roots, _joined(self._of_catalog(self.catalog, roots)))
        return Pictures((), self._of_folder)

    def roots(self) -> tuple[Path, ...]:
        """The folders the pictures are below."""
        if self.manifest is not None:
            return self.manifest.roots
        if self.catalog is not None:
            return tuple(source.path for source in self.catalog.sources)
        return (self.config.source,)

    @cached_property
    def manifest(self) -> Manifest | None:
        return None if self.config.manifest is None else Manifest.open(self.config.manifest)

    @cached_property
    def catalog(self) -> Catalog | None:
        source = self.config.source
        if not source.is_dir():
            raise ConfigError(f"source = {source}: no such folder. Name the one that holds the pictures, or a catalog.")
        if not is_catalog(source):
            return None
        catalog = Catalog.open(source)
        if not catalog.knows_pictures:
            raise ConfigError(
                f"source = {source}: this catalog knows no pictures, only what is said about them. Build it with the "
                f"folder or tars of the pictures among its sources, or name their folder as source."
            )
        return catalog

    @cached_property
    def _of_folder(self) -> pa.RecordBatch:
        images = scan_images(self.config.source)
        names = [image.name for image in images]
        return _places(
            [key_of(name) for name in names],
            np.zeros(len(images), np.int16),
            names,
            pa.nulls(len(images), pa.large_string()),
            np.zeros(len(images), np.int64),
            np.fromiter((image.num_bytes for image in images), np.int64, len(images)),
            np.fromiter((image.mtime_ns for image in images), np.int64, len(images)),
        )

    def _of_catalog(self, catalog: Catalog, roots: Sequence[Path]) -> Iterator[pa.RecordBatch]:
        names = ["key", "source", "image", "tar", "offset", "num_bytes"]
        times = _Times(roots)
        for chunk in catalog.chunks(names):
            yield times.places(chunk.table.rename_columns(["key", "root", *names[2:]]))

    def _of_manifest(self, manifest: Manifest) -> Iterator[pa.RecordBatch]:
        times = _Times(manifest.roots)
        for batch in manifest.chunks(["key", "root", "image", "tar", "offset", "num_bytes"]):
            yield times.places(batch)


class _Times:
    """Adds to rows of a catalog or manifest when their files were last written; a tar is looked at once."""

    def __init__(self, roots: Sequence[Path]) -> None:
        self._roots = roots
        self._tars: dict[tuple[int, str], int] = {}

    def places(self, batch: pa.RecordBatch) -> pa.RecordBatch:
        batch = batch.filter(pc.is_valid(batch["image"]))
        roots, images, tars = (batch[name].to_pylist() for name in ("root", "image", "tar"))
        times = np.zeros(len(roots), np.int64)
        for number, (root, image, tar) in enumerate(zip(roots, images, tars, strict=True)):
            if tar is None:
                times[number] = self._time(root, image)
            else:
                if (root, tar) not in self._tars:
                    self._tars[root, tar] = self._time(root, tar)
                times[number] = self._tars[root, tar]
        return _places(
            batch["key"], batch["root"], batch["image"], batch["tar"], batch["offset"].fill_null(0),
            batch["num_bytes"].fill_null(-1), times,
        )  # fmt: skip

    def _time(self, root: int, name: str) -> int:
        path = f"{self._roots[root]}/{name}" if name else str(self._roots[root])  # a source that is one tar
        try:
            return os.stat(path).st_mtime_ns
        except FileNotFoundError:
            return -1
        except OSError as error:
            raise DataError(f"{path}: cannot be looked at ({error.strerror}).") from error


def _places(*columns: Any) -> pa.RecordBatch:
    arrays = [
        (column if isinstance(column, pa.Array) else pa.array(column)).cast(field.type)
        for column, field in zip(columns, _SCHEMA, strict=True)
    ]
    return pa.RecordBatch.from_arrays(arrays, schema=_SCHEMA)


def _joined(batches: Iterator[pa.RecordBatch]) -> pa.RecordBatch:
    table = pa.Table.from_batches(list(batches), schema=_SCHEMA).combine_chunks()
    found = table.to_batches()
    return found[0] if found else pa.RecordBatch.from_pylist([], schema=_SCHEMA)
