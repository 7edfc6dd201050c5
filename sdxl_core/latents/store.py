"""Reading latents back by key, checked against what was committed, in either layout."""

from __future__ import annotations

import os
from functools import lru_cache
from pathlib import Path

from sdxl_core.errors import ShardError
from sdxl_core.latents.formats import LatentRecord, PackedFile, read_per_image
from sdxl_core.latents.index import LatentIndex

MAX_OPEN = 256
_PICTURE_EXTENSIONS = {".png", ".jpg", ".jpeg", ".webp", ".bmp", ".avif"}


class LatentStore:
    """The latents below a folder. A cache without index (made by sd-scripts) is found by file names alone."""

    def __init__(self, latents: Path) -> None:
        self.folder = latents
        self._index = LatentIndex.open(latents) if LatentIndex.exists(latents) else None
        self._packed = lru_cache(maxsize=MAX_OPEN)(PackedFile)

    @property
    def keys(self) -> tuple[str, ...]:
        if self._index is None:
            return ()
        return tuple(key for batch in self._index.chunks(["key"]) for key in batch["key"].to_pylist())

    def path(self, key: str) -> Path:
        """Where a key's latents are, or would be."""
        found = self._find(key)
        if found is not None:
            return found[0]
        stem = os.path.splitext(key)[0] if os.path.splitext(key)[1].lower() in _PICTURE_EXTENSIONS else key
        return self.folder / f"{stem}.npz"

    def has(self, key: str) -> bool:
        return self.path(key).is_file()

    def crc32(self, key: str) -> int | None:
        found = self._find(key)
        return None if found is None else found[2]

    def read(self, key: str) -> LatentRecord:
        """A key's latents. Raises: ShardError: missing, torn, or other content than was committed."""
        found = self._find(key)
        if found is None:
            return read_per_image(self.path(key))
        path, row, crc32 = found
        if row < 0:
            return read_per_image(path, expected_crc32=crc32)
        packed = self._packed(path)
        if int(packed.row_crc32s[row]) != crc32 or packed.key(row) != key:
            raise ShardError(f"{path}: row {row} holds other latents than were committed for {key!r}.")
        return packed.row(row)

    def _find(self, key: str) -> tuple[Path, int, int] | None:
        if self._index is None:
            return None
        number = self._index.find(key)
        if number < 0:
            return None
        row = self._index.take([number], ["file", "row", "crc32"]).to_pylist()[0]
        path = self._index.files([row["file"]])["path"][0].as_py()
        return self.folder / path, row["row"], row["crc32"]
