"""The pictures of a work shard: an immutable list, named by the digest of its content.

A shard is cut once and never again: pictures that come later make new shards, pictures that go leave their row behind.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Self

import numpy as np
import pyarrow as pa

from sdxl_core.catalog.images import ImagePlace
from sdxl_core.errors import ShardError
from sdxl_core.files import digest_of
from sdxl_core.latents.matching import hashes_of, mixed
from sdxl_core.latents.tables import read_table, read_words, write_table

Ints = np.ndarray[Any, np.dtype[Any]]
FORMAT = 2
LEDGER_FOLDER = ".ledger"
ENDING = ".rows.arrow"
# Where a picture is, and what it was when the shard was cut.
PLACES = [
    pa.field("name", pa.large_string(), nullable=False),  # its own key: path below its source without extension
    pa.field("root", pa.int16(), nullable=False),  # position among the shard's roots; with one folder 0
    pa.field("image", pa.large_string(), nullable=False),  # path below the root, or member of the tar
    pa.field("tar", pa.large_string()),  # path of the tar below the root; null: a plain file
    pa.field("offset", pa.int64(), nullable=False),  # of the first byte in the tar, else 0
    pa.field("num_bytes", pa.int64(), nullable=False),
    pa.field("mtime_ns", pa.int64(), nullable=False),  # of the file or the tar
]
ROWS = pa.schema(
    [
        pa.field("key", pa.large_string(), nullable=False),  # in the metadata JSON the shard was cut from
        *PLACES,
        pa.field("identity", pa.uint64(), nullable=False),  # hash of name, image, tar, offset, size, time
    ]
)


def identities(places: pa.RecordBatch) -> Ints:
    """uint64: a hash of what each picture is called and was when it was looked at. Args: places: has PLACES."""
    tar = places["tar"].fill_null("") if places["tar"].null_count else places["tar"]
    hashes = mixed(hashes_of(places["name"]), hashes_of(places["image"]).view(np.int64), hashes_of(tar).view(np.int64))
    return mixed(hashes, *(places[name].to_numpy() for name in ("offset", "num_bytes", "mtime_ns")))


@dataclass(frozen=True)
class ShardRows:
    """A shard's rows, memory-mapped. `roots`: the folders of a catalog's sources, empty where there is one source
    folder, which the config names.   `commit_size`: rows a commit group.
    """

    path: Path
    commit_size: int
    roots: tuple[Path, ...]
    num_rows: int

    @classmethod
    def open(cls, path: Path) -> Self:
        """Raises: ShardError: gone or damaged."""
        try:
            told = read_words(path)
            return cls(path, told["commit_size"], tuple(map(Path, told["roots"])), told["num_rows"])
        except (ShardError, KeyError, TypeError) as error:
            raise _gone(path) from error

    @cached_property
    def table(self) -> pa.RecordBatch:
        """All rows, `ROWS`. Raises: ShardError."""
        try:
            return read_table(self.path)
        except ShardError as error:
            raise _gone(self.path) from error

    def places(self, rows: Ints, source: Path) -> list[ImagePlace]:
        """Where the pictures of rows are. Args: source: the folder of pictures, where no catalog names roots."""
        columns = self.table.select(["root", "image", "tar", "offset", "num_bytes", "mtime_ns"]).take(pa.array(rows))
        roots = self.roots or (source,)
        return [
            ImagePlace(
                path=roots[row["root"]] / (row["image"] if row["tar"] is None else row["tar"]),
                name=row["image"],
                offset=row["offset"],
                num_bytes=row["num_bytes"],
                in_tar=row["tar"] is not None,
                tar_mtime_ns=-1 if row["tar"] is None else row["mtime_ns"],
            )
            for row in columns.to_pylist()
        ]


def write_rows(
    folder: Path,
    batch: pa.RecordBatch,
    *,
    roots: tuple[Path, ...],
    commit_size: int,
    fingerprint: str,
    taken: Collection[str],
) -> tuple[str, Path]:
    """Write a shard's rows.

    Args:   batch: `ROWS`.   taken: digests of other shards; one of the same rows (all taken out there) is not this one.
    Returns: the shard's digest and the file.
    """
    content = (batch["identity"].to_numpy().tobytes(), hashes_of(batch["key"]).tobytes())
    digest = digest_of(FORMAT, fingerprint, commit_size, *map(str, roots), *content)
    while digest in taken:
        digest = digest_of(digest)
    path = folder / f"{digest[:32]}{ENDING}"
    words = {
        "digest": digest,
        "fingerprint": fingerprint,
        "commit_size": commit_size,
        "roots": [str(root) for root in roots],
        "num_rows": batch.num_rows,
    }
    write_table(path, batch, words)
    return digest, path


def shard_file(rows: Path, ending: str) -> Path:
    """A file that goes with a shard's rows: `.ledger.jsonl`, `.done.arrow`, …"""
    return rows.with_name(rows.name.removesuffix(ENDING) + ending)


def _gone(path: Path) -> ShardError:
    return ShardError(f"{path}: the listing of this shard is gone or damaged. Run cache-latents again.")
