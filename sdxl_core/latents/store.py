"""Reading latents back by key, checked against what the ledger recorded."""

from __future__ import annotations

import os
from pathlib import Path

from sdxl_core.errors import ShardError
from sdxl_core.latents.formats import LatentRecord, read_per_image
from sdxl_core.latents.ledger import LEDGER_FOLDER, LatentRow, ShardLedger


class LatentStore:
    """The latents below a folder. A cache without ledgers (made by sd-scripts) is found by file names alone."""

    def __init__(self, latents: Path) -> None:
        self.folder = latents
        self._rows: dict[str, LatentRow] = {}
        for path in sorted((latents / LEDGER_FOLDER).glob("*.ledger.jsonl")):
            self._rows |= {row.key: row for row in ShardLedger.read(path).rows()}

    @property
    def keys(self) -> tuple[str, ...]:
        """Keys that the ledgers know."""
        return tuple(self._rows)

    def path(self, key: str) -> Path:
        """Where a key's latents are, or would be."""
        if key in self._rows:
            return self.folder / self._rows[key].file
        stem = os.path.splitext(key)[0] if os.path.splitext(key)[1].lower() in _PICTURE_EXTENSIONS else key
        return self.folder / f"{stem}.npz"

    def has(self, key: str) -> bool:
        """Whether the key's file is there, with a ledger in the size it was written with; `read` checks the content."""
        if key in self._rows:
            return self._rows[key].mtime_on_disk(self.folder) is not None
        return self.path(key).is_file()

    def crc32(self, key: str) -> int | None:
        """Checksum of a key's latents as its ledger has it; None where no ledger knows the key."""
        return self._rows[key].crc32 if key in self._rows else None

    def read(self, key: str) -> LatentRecord:
        """A key's latents.

        Raises: ShardError: missing, torn, or other content than was committed.
        """
        record = read_per_image(self.path(key))
        row = self._rows.get(key)
        if row is not None and record.crc32() != row.crc32:
            raise ShardError(
                f"{self.path(key)}: holds other latents than were committed for {key!r}. Delete the file and run "
                f"cache-latents again: only what is missing is encoded."
            )
        return record


_PICTURE_EXTENSIONS = {".png", ".jpg", ".jpeg", ".webp", ".bmp", ".avif"}
