"""Fewer and larger packed files: small ones of a bucket merged, rows dropped that no ledger holds any more.

New files are written and synced, then the shard's ledger says where its rows are, then the index, and only then the
old files go. Killed at any point the set is whole: ledgers and index name files that are there, and what no ledger
names is swept away by the next run.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np

from sdxl_core.config import CompactLatentsConfig
from sdxl_core.errors import ConfigError, ShardError
from sdxl_core.files import digest_of, remove_stale_partials, sync_files
from sdxl_core.latents.convert.reindex import Move, rewrite_index
from sdxl_core.latents.formats import LatentRecord, PackedFile, WrittenFile, write_packed
from sdxl_core.latents.formats.packed import PackedDtype
from sdxl_core.latents.index import LatentIndex
from sdxl_core.latents.ledger import KEPT, LatentFile, ShardLedger
from sdxl_core.latents.rows import ENDING, LEDGER_FOLDER, ShardRows
from sdxl_core.latents.settings import fingerprint_of, latents_folder, read_settings
from sdxl_core.lock import output_lock
from sdxl_core.progress import Progress, no_progress
from sdxl_core.refs import LatentFilesRef

Ints = np.ndarray[Any, np.dtype[Any]]
PACKED = "packed"
MB, MAX_OPEN = 1_000_000, 128


def compact_latents(config: CompactLatentsConfig, *, progress: Progress = no_progress) -> LatentFilesRef:
    """Merge what is small within each shard and bucket. The latents stay the same bit for bit.

    Raises: ConfigError: not a packed set.   ShardError: a shard is not finished, or a file is damaged.   LockedError.
    """
    latents = latents_folder(config.path)
    settings = read_settings(latents)
    if settings.get("layout") != PACKED:
        raise ConfigError(f"{latents}: holds one file a picture. Convert it first: sdxl-flows convert-latents.")
    with output_lock(latents, purpose="compact-latents"):
        for folder in (latents / PACKED, latents / LEDGER_FOLDER):
            remove_stale_partials(folder, name="*", recursive=True)
        remove_stale_partials(latents, name="*")
        paths = sorted((latents / LEDGER_FOLDER).glob(f"*{ENDING}"))
        shards = [_Shard(latents, path, settings["packed_dtype"]) for path in paths]
        for number, shard in enumerate(shards):
            shard.merge(config.file_mb * MB)
            progress("compact", number + 1, len(shards))
        if LatentIndex.exists(latents):
            index, moves = LatentIndex.open(latents), [Move(path, path) for path in paths]
            rewrite_index(
                index, latents, moves, fingerprint=fingerprint_of(settings), layout=PACKED, made_from="compacted"
            )
        used = {file.path: file.num_bytes for shard in shards for file in shard.used_files()}
        _sweep(latents, set(used))
    return LatentFilesRef(
        what="compact-latents",
        path=latents,
        num_rows=sum(shard.num_kept for shard in shards),
        num_files=len(used),
        num_bytes=sum(used.values()),
    )


def _sweep(latents: Path, used: set[str]) -> None:
    """Remove packed files that no ledger names."""
    for path in (latents / PACKED).glob("*/*.npz"):
        if path.relative_to(latents).as_posix() not in used:
            path.unlink()


class _Shard:
    def __init__(self, latents: Path, path: Path, dtype: PackedDtype) -> None:
        self._latents, self._dtype = latents, dtype
        self._name = path.name[:16]
        self._packed = lru_cache(maxsize=MAX_OPEN)(self._opened)
        rows = ShardRows.open(path)
        self._keys = rows.table["key"]
        self._ledger = ShardLedger.read(path, rows.num_rows)
        self._ledger.settle(latents)
        if not self._ledger.is_done:
            raise ShardError(
                f"{path}: this shard is not finished, or lost files. Run cache-latents (or verify --repair) first."
            )

    @property
    def num_kept(self) -> int:
        return len(self._ledger.rows(KEPT))

    def used_files(self) -> list[LatentFile]:
        """Files that hold rows of this shard."""
        numbers = np.unique(self._ledger.columns["file"][self._ledger.rows(KEPT)])
        return [self._ledger.files[number] for number in numbers.tolist()]

    def merge(self, max_bytes: int) -> None:
        """Write merged files, and say in the ledger where the rows are now."""
        kept = self._ledger.rows(KEPT)
        bucket = self._ledger.columns["bucket"][kept]
        files: list[LatentFile] = []
        rows: list[int] = []
        file: list[int] = []
        at: list[int] = []
        for one in np.unique(bucket, axis=0):
            members = kept[(bucket == one).all(axis=1)]
            for part in self._parts(members, max_bytes):
                path = f"{PACKED}/{one[0]}x{one[1]}/{self._name}-c{self._digest(part)}.npz"
                if {self._ledger.files[number].path for number in self._ledger.columns["file"][part]} == {path}:
                    continue  # it was merged so before
                written = self._write(path, part)
                status = (self._latents / path).stat()
                rows += part
                file += [len(files)] * len(part)
                at += range(len(part))
                files.append(LatentFile(path, written.num_bytes, status.st_mtime_ns, written.crc32))
        if files:
            sync_files([self._latents / one.path for one in files])
            self._ledger.move(files, rows, file, at)
        self._ledger.summarise()

    def _parts(self, members: Ints, max_bytes: int) -> list[list[int]]:
        """Rows of one bucket that are to share a file, for every file to be written.

        Files of half the size or more, all of whose rows are kept, stay as they are; so does a single small one.
        """
        number = self._ledger.columns["file"][members]
        small: list[int] = []
        num_small = num_dead = 0
        row_bytes = 0
        for one in np.unique(number).tolist():
            mine = members[number == one]
            packed = self._packed(one)
            row_bytes = max(row_bytes, packed.num_bytes // packed.num_rows)
            if len(mine) < packed.num_rows or packed.num_bytes < max_bytes // 2:
                small += mine.tolist()
                num_small += 1
                num_dead += packed.num_rows - len(mine)
        if num_small < 2 and not num_dead:
            return []
        size = max(1, max_bytes // max(1, row_bytes))
        parts: dict[tuple[str, ...], list[list[int]]] = {}
        for row in sorted(small):
            same = parts.setdefault(self._open(row).array_names, [[]])
            if len(same[-1]) == size:
                same.append([])
            same[-1].append(row)
        return [part for same in parts.values() for part in same]

    def _open(self, row: int) -> PackedFile:
        return self._packed(int(self._ledger.columns["file"][row]))

    def _opened(self, file: int) -> PackedFile:
        return PackedFile(self._latents / self._ledger.files[file].path)

    def _record(self, row: int) -> LatentRecord:
        packed, at = self._open(row), int(self._ledger.columns["at"][row])
        if at >= packed.num_rows or packed.row_crc32s[at] != self._ledger.columns["crc32"][row]:
            raise ShardError(f"{packed.path}: row {at} is not what was committed. Run verify --repair first.")
        return packed.row(at)

    def _write(self, path: str, part: Sequence[int]) -> WrittenFile:
        keys = [self._keys[row].as_py() for row in part]
        written = write_packed(self._latents / path, keys, [self._record(row) for row in part], self._dtype)
        assert list(written.row_crc32s) == self._ledger.columns["crc32"][list(part)].tolist()
        return written

    def _digest(self, part: Sequence[int]) -> str:
        """Another name for other rows, so that no file is ever replaced by one of other content."""
        checksums = self._ledger.columns["crc32"][list(part)].tobytes()
        return digest_of(np.array(part, np.int64).tobytes(), checksums)[:12]
