"""Reading latents back by key, checked against what was committed, whatever layout they have.

A store may be shared by threads, and by processes that were forked after it was made: it reads at offsets, and what it
remembers is only files that are open.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np

from sdxl_core.catalog.parts import key_hash
from sdxl_core.errors import ShardError
from sdxl_core.latents.bare import BareCache
from sdxl_core.latents.formats import LatentRecord, PackedFile, read_per_image
from sdxl_core.latents.index import BATCH_ROWS, LatentIndex

MAX_OPEN = 256  # packed files open at once


class LatentStore:
    """The latents below a folder: those its index names, or where there is no index (a cache made by sd-scripts), files
    named like the keys.

    With an index, memory does not grow with the number of pictures: it is mapped, and shared by processes.
    """

    def __init__(self, latents: Path, *, max_open: int = MAX_OPEN) -> None:
        """Raises: DataError: a damaged index."""
        self.folder = latents
        self._prefix = f"{latents}/"
        self._index = _Places(LatentIndex.open(latents)) if LatentIndex.exists(latents) else None
        self._bare = BareCache(latents) if self._index is None else None
        self._packed = lru_cache(maxsize=max_open)(PackedFile)

    @property
    def keys(self) -> tuple[str, ...]:
        """In the order of the index; without one, the names of files without endings."""
        return tuple(self._bare.keys() if self._index is None else self._index.keys())  # type: ignore[union-attr]

    def has(self, key: str) -> bool:
        """Whether the key's file is there, with an index in the size it was written with; `read` checks the content."""
        if self._index is None:
            return self._bare_file(key) is not None
        number = self._index.find(key)
        return number >= 0 and self._index.is_there(self._prefix, number)

    def bucket(self, key: str) -> tuple[int, int]:
        """Width and height of a key's bucket in pixels. Raises: ShardError: no such key; without an index as `read`."""
        if self._index is None:
            return self.read(key).bucket
        return self._index.bucket(self._known(key))

    def path(self, key: str) -> Path:
        """The file that a key's latents are in. Raises: ShardError: there is none."""
        if self._index is None:
            return self._found(key)
        return Path(self._prefix + self._index.place(self._known(key))[0])

    def read(self, key: str) -> LatentRecord:
        """A key's latents. Raises: ShardError: none, torn, or other content than was committed."""
        return read_per_image(self._found(key)) if self._index is None else self._read_row(self._known(key), key)

    def _read_row(self, number: int, key: str) -> LatentRecord:
        assert self._index is not None
        name, row, crc32 = self._index.place(number)
        path = self._prefix + name
        if row < 0:
            return read_per_image(path, expected_crc32=crc32)
        packed = self._packed(path)
        if row >= packed.num_rows or packed.row_crc32s[row] != crc32 or packed.key(row) != key:
            raise ShardError(
                f"{path}: row {row} holds other latents than were committed for {key!r}. Run "
                f"`sdxl-flows verify` with --repair on this cache: it encodes exactly what is damaged again."
            )
        return packed.row(row)

    def _known(self, key: str) -> int:
        assert self._index is not None
        number = self._index.find(key)
        if number < 0:
            raise ShardError(f"{self.folder}: its index has no latents of {key!r}. Run cache-latents again.")
        return number

    def _bare_file(self, key: str) -> Path | None:
        assert self._bare is not None
        return self._bare.find(key)

    def _found(self, key: str) -> Path:
        path = self._bare_file(key)
        if path is None:
            raise ShardError(
                f"{self.folder}: the latents of {key!r} are gone: there is no .npz of that name. Run cache-latents "
                f"again: only what is missing is encoded."
            )
        return path


class _Places:
    """The columns of an index that say where latents are, as views of the mapped file."""

    def __init__(self, index: LatentIndex) -> None:
        self._index = index
        self._hashes, self._rows = index.sorted_hashes()
        self._views: dict[int, tuple[Any, ...]] = {}
        self._name = lru_cache(maxsize=4096)(self._look_up)

    def keys(self) -> Iterator[str]:
        for batch in self._index.chunks(["key"]):
            yield from batch["key"].to_pylist()

    def find(self, key: str) -> int:
        """The row of a key, -1 where there is none."""
        wanted = np.uint64(key_hash(key))
        place = int(self._hashes.searchsorted(wanted))
        while place < len(self._hashes) and self._hashes[place] == wanted:  # once, unless two keys share a hash
            number = int(self._rows[place])
            if self.key(number) == key:
                return number
            place += 1
        return -1

    def key(self, number: int) -> str:
        return self._batch(number)[0][number % BATCH_ROWS].as_py()  # type: ignore[no-any-return]

    def place(self, number: int) -> tuple[str, int, int]:
        """File, row in it (-1: it is one picture's), checksum."""
        _, file, row, crc32, _, _ = self._batch(number)
        at = number % BATCH_ROWS
        return self._name(int(file[at]))[0], int(row[at]), int(crc32[at])

    def bucket(self, number: int) -> tuple[int, int]:
        *_, width, height = self._batch(number)
        return int(width[number % BATCH_ROWS]), int(height[number % BATCH_ROWS])

    def is_there(self, prefix: str, number: int) -> bool:
        """Whether the file of a row has the recorded size."""
        name, num_bytes = self._name(int(self._batch(number)[1][number % BATCH_ROWS]))
        try:
            return Path(prefix + name).stat().st_size == num_bytes
        except (FileNotFoundError, NotADirectoryError):
            return False

    def _batch(self, number: int) -> tuple[Any, ...]:
        """key, file, row, crc32, bucket_width_px, bucket_height_px of the rows about a row."""
        found = self._views.get(number // BATCH_ROWS)
        if found is None:
            batch = self._index.batch(number // BATCH_ROWS)
            names = ("file", "row", "crc32", "bucket_width_px", "bucket_height_px")
            found = (batch["key"], *(batch[name].to_numpy() for name in names))
            self._views[number // BATCH_ROWS] = found
        return found

    def _look_up(self, file: int) -> tuple[str, int]:
        """Path and size of a file."""
        row = self._index.files([file])
        return row["path"][0].as_py(), row["num_bytes"][0].as_py()
