"""An index again, with the rows and texts of another one, after latents have moved to other files."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa

from sdxl_core.errors import ShardError
from sdxl_core.latents.index import ROWS, FileNumbers, IndexWriter, LatentIndex
from sdxl_core.latents.ledger import KEPT, LatentFile, ShardLedger
from sdxl_core.latents.matching import marks_of
from sdxl_core.latents.rows import ShardRows

Ints = np.ndarray[Any, np.dtype[Any]]
_SHARDS_OPEN = 64


class Move(NamedTuple):
    """A shard's rows file before, and after; the same file where its rows only changed place."""

    before: Path
    after: Path


class _Shard(NamedTuple):
    keys: pa.Array
    columns: dict[str, Ints]
    files: list[LatentFile]


def rewrite_index(
    old: LatentIndex, latents: Path, shards: Sequence[Move], *, fingerprint: str, layout: str, made_from: str
) -> None:
    """Write the index of `latents`: the rows of `old`, where the ledgers of the shards' new rows files have them now.

    Holds 16 bytes a picture and 4 a file. Raises: ShardError: `old` is not of these shards.
    """
    lookup = _Lookup(shards)
    others = [field.name for field in ROWS if field.name not in ("key_hash", "file", "row", "crc32")]
    with IndexWriter(latents, fingerprint=fingerprint, made_from=made_from) as writer:
        numbers = FileNumbers(writer, layout)
        for batch in old.chunks([field.name for field in ROWS]):
            shard, row = lookup.find(batch, latents)
            columns: dict[str, Any] = {name: batch[name] for name in others}
            placed = [np.zeros(batch.num_rows, kind) for kind in (np.int32, np.int32, np.uint32)]
            for number in np.unique(shard).tolist():
                mine = np.flatnonzero(shard == number)
                found = lookup.after(number)
                file, at, crc32 = (found.columns[name][row[mine]] for name in ("file", "at", "crc32"))
                for column, part in zip(placed, (numbers.of(number, found.files, file), at, crc32), strict=True):
                    column[mine] = part
            writer.add(columns | dict(zip(("file", "row", "crc32"), placed, strict=True)))
        writer.finish(metadata_sha256=old.metadata_sha256)


class _Lookup:
    """Which shard and row an entry of the index is, by key and checksum: a key may stand in several shards."""

    def __init__(self, shards: Sequence[Move]) -> None:
        self._shards = shards
        self.before = lru_cache(maxsize=_SHARDS_OPEN)(lambda number: _opened(shards[number].before))
        self.after = lru_cache(maxsize=_SHARDS_OPEN)(lambda number: _opened(shards[number].after))
        marks, places = [np.zeros(0, np.uint64)], [np.zeros(0, np.uint64)]
        for number in range(len(shards)):
            shard = self.before(number)
            kept = np.flatnonzero(shard.columns["state"] == KEPT)
            marks.append(marks_of(shard.keys.take(pa.array(kept)), shard.columns["crc32"][kept]))
            places.append(kept.astype(np.uint64) | np.uint64(number) << np.uint64(32))
        mark, place = np.concatenate(marks), np.concatenate(places)
        order = np.argsort(mark, kind="stable")
        self._marks, self._places = mark[order], place[order]

    def find(self, batch: pa.RecordBatch, latents: Path) -> tuple[Ints, Ints]:
        """Shard and row of each entry. Raises: ShardError: one that no ledger has."""
        wanted = marks_of(batch["key"], batch["crc32"].to_numpy())
        at = np.minimum(np.searchsorted(self._marks, wanted), max(0, len(self._marks) - 1))
        if not len(self._marks) or (self._marks[at] != wanted).any():
            raise ShardError(
                f"{latents}: the index names latents that no ledger has, or has with other content. Run cache-latents "
                f"again: it makes the index anew and encodes nothing that is there."
            )
        place = self._places[at]
        return (place >> np.uint64(32)).astype(np.int64), (place & np.uint64(0xFFFFFFFF)).astype(np.int64)


def _opened(rows: Path) -> _Shard:
    shard = ShardRows.open(rows)
    ledger = ShardLedger.read(rows, shard.num_rows)
    return _Shard(shard.table["key"], ledger.columns, ledger.files)
