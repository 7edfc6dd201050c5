"""A subset as a list: keys, and where the bytes of each picture are. Nothing is copied; processes share its pages."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import numpy as np
import orjson
import pyarrow as pa

from sdxl_core.catalog.images import ImagePlace
from sdxl_core.errors import ConfigError, DataError
from sdxl_core.files import atomic_writer

Ints = np.ndarray[Any, np.dtype[Any]]
MANIFEST_FILE = "manifest.arrow"
FORMAT = 1
ROWS = pa.schema(
    [
        pa.field("key", pa.string(), nullable=False),
        pa.field("record", pa.int64(), nullable=False),  # its number in the catalog
        pa.field("root", pa.int32(), nullable=False),  # position in `Manifest.roots`
        pa.field("image", pa.string()),  # path below the root, or member name in the tar; null: no source has pictures
        pa.field("tar", pa.string()),  # path of the tar below the root; null: a plain file
        pa.field("offset", pa.int64()),  # of the first data byte in the tar
        pa.field("num_bytes", pa.int64()),
    ]
)


@dataclass(frozen=True, slots=True)
class Manifest:
    """A finished manifest, memory-mapped: nothing is held but what is looked at.

    `catalog`, `catalog_digest`: what it was picked from, and that one's identity.   `query`: how.
    `roots`: the folders that the paths are below.
    """

    path: Path
    catalog: Path
    catalog_digest: str
    query: str
    roots: tuple[Path, ...]
    num_records: int
    _reader: pa.ipc.RecordBatchFileReader
    _starts: Ints

    @classmethod
    def open(cls, path: Path) -> Self:
        """Args: path: the file, or the folder that has it. Raises: ConfigError: it is not there.   DataError."""
        path = path / MANIFEST_FILE if path.is_dir() else path
        try:
            reader = pa.ipc.open_file(pa.memory_map(str(path)))
            told = orjson.loads(reader.schema.metadata[b"subset"])
            if told["format"] != FORMAT:
                raise DataError(f"{path}: a manifest of format {told['format']}, not {FORMAT}. Make the subset again.")
            sizes = [reader.get_batch(number).num_rows for number in range(reader.num_record_batches)]
            starts = np.concatenate([[0], np.cumsum(sizes, dtype=np.int64)])
            roots = tuple(map(Path, told["roots"]))
            origin = Path(told["catalog"]), told["catalog_digest"], told["query"]
            return cls(path, *origin, roots, int(starts[-1]), reader, starts)
        except FileNotFoundError as error:
            raise ConfigError(f"{path}: there is no manifest. `sdxl-flows subset --how manifest` makes one.") from error
        except (OSError, pa.ArrowInvalid, orjson.JSONDecodeError, KeyError, TypeError) as error:
            raise DataError(f"{path}: no manifest, or a damaged one ({error}). Make the subset again.") from error

    def chunks(self, columns: Sequence[str]) -> Iterator[pa.RecordBatch]:
        """All rows in order, some ten thousand at a time; `columns` of `ROWS`."""
        for number in range(self._reader.num_record_batches):
            yield self._reader.get_batch(number).select(list(columns))

    def place(self, row: int) -> ImagePlace:
        """Where the picture of a row is, for an `ImageReader`. Raises: IndexError: there is no such row.
        DataError: its catalog knows no pictures.
        """
        if not 0 <= row < self.num_records:
            raise IndexError(f"{self.path}: row {row} of {self.num_records}")
        number = int(np.searchsorted(self._starts, row, "right")) - 1
        at = self._reader.get_batch(number).slice(row - int(self._starts[number]), 1).to_pylist()[0]
        if at["image"] is None:
            raise DataError(f"{self.path}: {at['key']} has no picture; {self.catalog} was made of metadata alone.")
        return ImagePlace(
            path=self.roots[at["root"]] / (at["image"] if at["tar"] is None else at["tar"]),
            name=at["image"],
            offset=at["offset"] or 0,
            num_bytes=at["num_bytes"],
            in_tar=at["tar"] is not None,
        )


def write_manifest(
    path: Path,
    batches: Iterable[pa.RecordBatch],
    *,
    catalog: Path,
    catalog_digest: str,
    query: str,
    roots: Sequence[Path],
) -> int:
    """Write a manifest as its rows come, whole or not at all. Args: batches: of `ROWS`. Returns the number of rows."""
    told = {
        "format": FORMAT,
        "catalog": str(catalog),
        "catalog_digest": catalog_digest,
        "query": query,
        "roots": [str(root) for root in roots],
    }
    num_rows = 0
    schema = ROWS.with_metadata({"subset": orjson.dumps(told)})
    with atomic_writer(path) as file, pa.ipc.new_file(file, schema) as writer:
        for batch in batches:
            writer.write_batch(batch)
            num_rows += batch.num_rows
    return num_rows
