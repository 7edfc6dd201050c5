"""Encode one shard: what its ledger does not know yet goes through the engine, and is committed group by group.

Batches and groups are a pure function of the shard, because a VAE's output depends on the batch it is in. A group that
was never committed is done whole; of one that has lost rows (a file gone, a byte flipped) the batches of those rows are
replayed and only they are written. So an interrupted or repaired shard ends with the bytes of an undisturbed one.
"""

from __future__ import annotations

import errno
import time
from collections.abc import Iterable, Iterator, Sequence
from contextvars import copy_context
from typing import Any

import numpy as np
import pyarrow.compute as pc

from sdxl_core.config import CacheLatentsConfig
from sdxl_core.errors import ConfigError, ShardError
from sdxl_core.files import remove_stale_partials, sync_files
from sdxl_core.latents.engine import EncodedGroup, EncodedPicture, Engine, Picture
from sdxl_core.latents.formats import (
    LatentRecord,
    WrittenFile,
    packed_name,
    per_image_name,
    write_packed,
    write_per_image,
)
from sdxl_core.latents.ledger import (
    KEPT,
    OPEN,
    CommitGroup,
    LatentFile,
    Rejection,
    read_summary,
)
from sdxl_core.latents.quarantine import Attempts
from sdxl_core.latents.rows import ShardRows
from sdxl_core.latents.shards import TRIED_AGAIN, reference, settled, shard_is_finished
from sdxl_core.lock import still_held
from sdxl_core.progress import Progress, no_progress
from sdxl_core.refs import LatentShardRef, ShardRef

Ints = np.ndarray[Any, np.dtype[Any]]
# Files by path; of each row its file, its row in it or -1, its CRC-32.
_Written = tuple[list[tuple[str, WrittenFile]], list[int], list[int], list[int]]
MAX_FLOAT16 = 65_504.0
_IN_A_BATCH = ("nan_latent", "bad_file_name")  # reasons found out after a batch: the picture was part of it
_NO_SUCH_NAME = (errno.ENAMETOOLONG, errno.EISDIR, errno.ENOTDIR, errno.EEXIST)


def encode_shard(
    shard: ShardRef, config: CacheLatentsConfig, device: str, lock: str, *, progress: Progress = no_progress
) -> LatentShardRef:
    """Encode what the shard's ledger does not know yet. The caller holds the output's lock.

    Args:   device: `cpu`, or a card's number, which this process sees as cuda:0.   lock: see `still_held`.
    Raises: ShardError: the shard's listing is gone.   ConfigError: a folder that pictures are in is gone.
            LockedError: the lock was lost.   DiskFullError.   Everything committed before is kept.
    """
    done = shard_is_finished(shard, config, lock)
    if done is not None:
        progress("latents", done.num_seen, done.num_seen)
        return done
    _ShardEncoder(shard, config, device, lock, progress).run()
    summary = read_summary(shard.path)
    if summary is None:
        raise ShardError(f"{shard.path}: its ledger was changed meanwhile. Run cache-latents again.")
    return reference(shard, summary)


class _ShardEncoder:
    """One run over a shard's open rows."""

    def __init__(self, shard: ShardRef, config: CacheLatentsConfig, device: str, lock: str, progress: Progress) -> None:
        self._shard, self._config, self._device, self._progress = shard, config, device, progress
        self._lock = lock
        self._context = copy_context()  # the caller's run, in its artifacts: progress is told from another thread
        self._latents = config.out / "latents"
        self._rows = ShardRows.open(shard.path)
        self._ledger = settled(shard, self._latents, lock)
        self._attempts = Attempts(shard.path)
        try:
            self._names = self._rows.table["name"]
        except ShardError:
            shard.path.unlink(missing_ok=True)  # the next plan cuts the same shard again, and its ledger counts
            raise
        self._keys: dict[int, dict[str, int]] = {}  # of the groups under way: key -> row
        self._written: dict[int, tuple[str, WrittenFile] | Rejection] = {}  # by row, of the group that is encoded

    def run(self) -> None:
        self._check_roots()
        for row, why in self._attempts.killers(self._rows, self._ledger, self._config):
            self._reject(row, why)
        if self._attempts.num_deaths:
            self._sweep()
        started = time.monotonic()
        before = len(self._ledger.rows(OPEN))
        report: dict[str, Any] = {"images_per_s": 0.0, "bound_by": "read", "seconds": {}}
        if before:
            with self._attempts.running():
                engine = Engine(self._config, self._device)
                write = self._write if self._config.layout == "per_image" else None
                told = engine.run(self._groups(), self._commit, write)
            report = {"bound_by": told.bound_by, "seconds": {name: round(s, 3) for name, s in told.seconds.items()}}
        still_open = self._ledger.rows(OPEN)
        if len(still_open):
            raise ShardError(
                f"{self._shard.path}: {len(still_open)} pictures of shard {self._shard.index} came back neither "
                f"encoded nor rejected. Run cache-latents again; if it stays so, it is a mistake of ours."
            )
        elapsed = time.monotonic() - started
        report["images_per_s"] = before / elapsed if elapsed else 0.0
        self._attempts.forget()  # first: a shard that is closed is not looked at again
        self._ledger.close(report | {"device": self._device})

    def _check_lock(self) -> None:
        with still_held(self._latents, self._lock):
            pass  # files that another process has recorded are not written over

    def _check_roots(self) -> None:
        roots = self._rows.roots or (self._config.source,)
        for number in pc.unique(self._rows.table["root"]).to_pylist():  # a catalog's other sources hold only words
            if not roots[number].exists():
                raise ConfigError(
                    f"{roots[number]}: what holds the pictures is not there; is its disk mounted? Nothing was "
                    f"rejected. Put it back and run the same command again."
                )

    def _sweep(self) -> None:
        """Remove what a process that died left half written beside latents that are still to be made."""
        stems = self._names.take(self._ledger.rows(OPEN)).to_pylist()
        folders = {(self._latents / stem).parent for stem in stems}
        for folder in folders if self._config.layout == "per_image" else (self._latents / "packed").glob("*"):
            remove_stale_partials(folder, name="*")

    def _groups(self) -> Iterator[tuple[int, Sequence[Picture]]]:
        """Commit groups with open rows: their pictures, in the shard's order."""
        size = self._rows.commit_size
        state = self._ledger.columns["state"]
        for number in sorted({row // size for row in self._ledger.rows(OPEN).tolist()}):
            rows = np.arange(number * size, min((number + 1) * size, self._rows.num_rows))
            if (state[rows] == KEPT).any():
                rows = self._replayed(rows)
            rows = rows[(state[rows] == OPEN) | (state[rows] == KEPT) | self._was_in_a_batch(rows)]
            keys = self._rows.table["key"].take(rows).to_pylist()
            self._keys[number] = dict(zip(keys, rows.tolist(), strict=True))
            places = self._rows.places(rows, self._config.source)
            self._attempts.reached(number)
            yield number, [Picture(key=key, place=place) for key, place in zip(keys, places, strict=True)]

    def _was_in_a_batch(self, rows: Ints) -> Ints:
        rejected = self._ledger.rejected
        return np.array([row in rejected and rejected[row].reason in _IN_A_BATCH for row in rows.tolist()], bool)

    def _replayed(self, rows: Ints) -> Ints:
        """Of a group that was committed once, the rows of those batches that have an open row."""
        columns, size = self._ledger.columns, self._config.batch_size
        bucket = columns["bucket"][rows]
        state = columns["state"][rows]
        is_known = bucket[:, 0] > 0
        if self._was_in_a_batch(rows).any() or not is_known[state == OPEN].all() or size < 1:
            return rows
        wanted = np.zeros(len(rows), bool)
        for one in np.unique(bucket[is_known], axis=0):
            members = np.flatnonzero(((state == OPEN) | (state == KEPT)) & (bucket == one).all(axis=1))
            batch = np.arange(len(members)) // size
            wanted[members[np.isin(batch, batch[state[members] == OPEN])]] = True
        return rows[wanted]

    def _commit(self, group: EncodedGroup) -> None:
        """Write, sync, record. Called by the engine for one group after the other."""
        self._check_lock()
        rows_of = self._keys.pop(group.number)
        state = self._ledger.columns["state"]
        rejected = {rows_of[key]: Rejection(reason, detail) for key, reason, detail in group.rejected}
        encoded = []
        for item in group.pictures:
            row = rows_of[item.picture.key]
            if self._config.layout == "packed" and not _fits(item.record, self._config.packed_dtype):
                rejected[row] = Rejection("nan_latent", "the VAE gives values that are too large for float16")
            elif state[row] == OPEN:
                encoded.append((row, item))
        if any(why.reason in TRIED_AGAIN for why in rejected.values()):
            self._check_roots()
        if self._config.layout == "packed":
            files, file, at, checksums = self._write_packed(group.number, encoded)
        else:
            rejected |= {row: why for row, why in self._written.items() if isinstance(why, Rejection)}
            encoded = [one for one in encoded if one[0] not in rejected]
            files, file, at, checksums = self._per_image_files(row for row, _ in encoded)
            self._written.clear()
        rejected = {row: why for row, why in sorted(rejected.items()) if state[row] == OPEN}
        sync_files([self._latents / path for path, _ in files])
        self._ledger.commit(
            CommitGroup(
                number=group.number,
                files=[self._as_written(path, written) for path, written in files],
                rows=[row for row, _ in encoded],
                file=file,
                at=at,
                crc32=checksums,
                bucket=[(e.bucket.width_px, e.bucket.height_px) for _, e in encoded],
                size=[(e.record.original_width_px, e.record.original_height_px) for _, e in encoded],
                crop=[e.record.crop_ltrb for _, e in encoded],
                rejected=rejected,
                notes=list(group.notes),
            )
        )
        self._attempts.committed(group.number)
        done = self._rows.num_rows - len(self._ledger.rows(OPEN))
        self._context.run(self._progress, "latents", done, self._rows.num_rows)

    def _write(self, number: int, batch: Sequence[EncodedPicture]) -> None:
        """One file a picture; what the file system has no name for is rejected. Called by the engine before `_commit`,
        so that a group's end has little left to do: the device waits for it."""
        self._check_lock()
        for item in batch:
            row = self._keys[number][item.picture.key]
            if self._ledger.columns["state"][row] != OPEN:
                continue
            size = {"width_px": item.record.original_width_px, "height_px": item.record.original_height_px}
            path = per_image_name(self._names[row].as_py(), self._config.npz_naming, **size)
            try:
                self._written[row] = path, write_per_image(self._latents / path, item.record)
            except OSError as error:
                if error.errno not in _NO_SUCH_NAME:
                    raise
                detail = f"its latents cannot be called {path}: {error.strerror}"
                self._written[row] = Rejection("bad_file_name", detail)

    def _per_image_files(self, rows: Iterable[int]) -> _Written:
        """What `_write` made of rows."""
        found = (self._written[row] for row in rows)
        files = [one for one in found if not isinstance(one, Rejection)]
        return files, list(range(len(files))), [-1] * len(files), [written.crc32 for _, written in files]

    def _write_packed(self, number: int, encoded: Sequence[tuple[int, EncodedPicture]]) -> _Written:
        """One file a bucket; `file` and `at` in the order of `encoded`."""
        by_bucket: dict[tuple[int, int], list[int]] = {}
        for place, (_, item) in enumerate(encoded):
            by_bucket.setdefault((item.bucket.width_px, item.bucket.height_px), []).append(place)
        kept = self._ledger.columns["file"][self._ledger.rows(KEPT)]
        taken = {self._ledger.files[one].path for one in np.unique(kept).tolist()}
        files: list[tuple[str, WrittenFile]] = []
        file, at, checksums = [0] * len(encoded), [0] * len(encoded), [0] * len(encoded)
        for (width_px, height_px), places in sorted(by_bucket.items()):
            path = packed_name(self._shard.digest, number, width_px=width_px, height_px=height_px, taken=taken)
            items = [encoded[place][1] for place in places]
            keys, records = [item.picture.key for item in items], [item.record for item in items]
            written = write_packed(self._latents / path, keys, records, self._config.packed_dtype)
            for row, place in enumerate(places):
                file[place], at[place], checksums[place] = len(files), row, written.row_crc32s[row]
            files.append((path, written))
        return files, file, at, checksums

    def _as_written(self, path: str, written: WrittenFile) -> LatentFile:
        mtime_ns = (self._latents / path).stat().st_mtime_ns
        return LatentFile(path, written.num_bytes, mtime_ns, written.crc32)

    def _reject(self, row: int, why: Rejection) -> None:
        none: dict[str, Any] = dict.fromkeys(("files", "rows", "file", "at", "crc32", "bucket", "size", "crop"), ())
        self._ledger.commit(CommitGroup(number=row // self._rows.commit_size, rejected={row: why}, **none))


def _fits(record: LatentRecord, dtype: str) -> bool:
    """Whether no value becomes infinite in `dtype`."""
    arrays = (array for name, array in record.arrays() if name != "alpha_mask")
    return dtype == "float32" or all(float(np.abs(array).max(initial=0)) < MAX_FLOAT16 for array in arrays)
