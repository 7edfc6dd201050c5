"""What a shard has finished: one JSON line a commit group, appended after the group's files were synced.

Every line carries a checksum; one that does not fit does not count, and neither does a row whose file is gone or
altered (`settle`). Later lines win. A shard without open rows has a summary beside its ledger, so that resuming reads a
few kilobytes a shard and looks at each file once, instead of parsing millions of rows.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import orjson
import pyarrow as pa

from sdxl_core.errors import ShardError
from sdxl_core.files import disk_errors, sync_folder, write_atomic
from sdxl_core.latents.formats import crc32
from sdxl_core.latents.rows import shard_file
from sdxl_core.latents.tables import checked_json, parse_checked, read_table, read_words, write_table
from sdxl_core.lock import held_token, still_held

Ints = np.ndarray[Any, np.dtype[Any]]
OPEN, KEPT, REJECTED, REMOVED = range(4)
LEDGER, SUMMARY = ".ledger.jsonl", ".done.arrow"
_BLOCK_BYTES = 65_536
# What is known of each row. file: position among the ledger's files; at: row in a packed file, else -1.
COLUMNS: dict[str, tuple[str, tuple[int, ...]]] = {
    "state": ("u1", ()),
    "file": ("<i4", ()),
    "at": ("<i4", ()),
    "crc32": ("<u4", ()),
    "bucket": ("<i4", (2,)),  # width, height in pixels
    "size": ("<i4", (2,)),  # of the source picture
    "crop": ("<f8", (4,)),  # left, top, right, bottom
}
# How the summary names columns that have several numbers a row.
PARTS = {
    "bucket": ("bucket_width_px", "bucket_height_px"),
    "size": ("original_width_px", "original_height_px"),
    "crop": ("crop_left", "crop_top", "crop_right", "crop_bottom"),
}


class LatentFile(NamedTuple):
    """A file of latents as it was written. `path`: POSIX, below the latents folder.   crc32: of all its bytes."""

    path: str
    num_bytes: int
    mtime_ns: int
    crc32: int

    def mtime_on_disk(self, latents: Path) -> int | None:
        """When it was last written (ns), None where it is gone or of another size."""
        try:
            status = os.stat(f"{latents}/{self.path}")
        except (FileNotFoundError, NotADirectoryError):
            return None
        return status.st_mtime_ns if status.st_size == self.num_bytes else None


class Rejection(NamedTuple):
    """Why a row has no latents. `attempts`: how often it was tried before that was decided."""

    reason: str
    detail: str
    attempts: int = 1


@dataclass(frozen=True, slots=True, kw_only=True)
class CommitGroup:
    """What a commit group wrote and rejected. `rows`: row numbers in the shard; the other columns go with them.

    files: as written and synced.   file: of each row, position in `files`.   at, crc32, bucket, size, crop: as COLUMNS.
    """

    number: int
    files: Sequence[LatentFile]
    rows: Sequence[int]
    file: Sequence[int]
    at: Sequence[int]
    crc32: Sequence[int]
    bucket: Sequence[tuple[int, int]]
    size: Sequence[tuple[int, int]]
    crop: Sequence[tuple[float, float, float, float]]
    rejected: Mapping[int, Rejection] = field(default_factory=dict)
    notes: Sequence[str] = ()


@dataclass(slots=True, kw_only=True)
class ShardLedger:
    """A shard's ledger as read. `columns`: COLUMNS by name, an entry a row.

    commits: when a group was recorded (seconds since 1970, for people), and how many rows it kept.
    report: how the shard was encoded, once it is done.   is_damaged: it has lines that are none of ours; `settle` drops
    them.   lock: of the process that this one works for, see `still_held`; else this one's own counts, if it holds any.
    """

    path: Path
    columns: dict[str, Ints]
    files: list[LatentFile] = field(default_factory=list)
    rejected: dict[int, Rejection] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    commits: list[tuple[float, int]] = field(default_factory=list)
    report: dict[str, Any] | None = None
    is_damaged: bool = False
    lock: str = ""

    @classmethod
    def read(cls, rows: Path, num_rows: int, *, lock: str = "") -> ShardLedger:
        """Every whole line; an empty ledger where there is none. Args: rows: the shard's listing."""
        columns = {name: np.zeros((num_rows, *shape), kind) for name, (kind, shape) in COLUMNS.items()}
        ledger = cls(path=shard_file(rows, LEDGER), columns=columns, lock=lock)
        for line in _lines(ledger.path):
            if line is None or not ledger._take(line):
                ledger.is_damaged = True
        return ledger

    @property
    def num_rows(self) -> int:
        return len(self.columns["state"])

    @property
    def is_done(self) -> bool:
        """Whether no row is open and the report is there."""
        return self.report is not None and not self.is_damaged and bool((self.columns["state"] != OPEN).all())

    def rows(self, state: int) -> Ints:
        """int64: numbers of the rows in a state."""
        return np.flatnonzero(self.columns["state"] == state)

    def commit(self, group: CommitGroup) -> None:
        """Record a group whose files are synced."""
        record = {name: getattr(group, name) for name in CommitGroup.__slots__}
        rejected = [[row, *why] for row, why in group.rejected.items()]
        self._append(record | {"rejected": rejected, "time": round(time.time(), 1)})

    def lose(self, rows: Sequence[int] | Ints) -> None:
        """Record that rows have no good latents any more: they are open again, and will be encoded."""
        self._append({"lost": [int(row) for row in rows]})

    def remove(self, rows: Sequence[int] | Ints) -> None:
        """Record that rows are taken out for good. Encoded again they are rows of another shard."""
        self._append({"removed": [int(row) for row in rows]})

    def move(self, files: Sequence[LatentFile], rows: Sequence[int], file: Sequence[int], at: Sequence[int]) -> None:
        """Record that rows are now in other files, which are synced; their latents are the same."""
        self._append({"moved": [int(row) for row in rows], "files": files, "file": list(file), "at": list(at)})

    def close(self, report: dict[str, Any]) -> None:
        """Record that every row is done, and how; and write the summary."""
        self._append({"done": report})
        self.summarise()

    def settle(self, latents: Path) -> None:
        """Bring the ledger in line with the files on disk.

        A file of the recorded size and time is believed. One of another time (a copied or restored cache) is read, and
        believed if its checksum fits. The rows of any other file are open again.
        """
        if self.is_damaged:
            whole = [line for line in _lines(self.path) if line is not None]
            write_atomic(self.path, (checked_json(line) + b"\n" for line in whole))
            self.is_damaged = False
        touched, lost = [], np.zeros(len(self.files) + 1, bool)
        used = set(np.unique(self.columns["file"][self.rows(KEPT)]).tolist())
        for number in sorted(used):
            file = self.files[number]
            mtime_ns = file.mtime_on_disk(latents)
            if mtime_ns == file.mtime_ns:
                continue
            if mtime_ns is not None and _checksum(latents / file.path) == file.crc32:
                touched.append([number, mtime_ns])
            else:
                lost[number] = True
        if touched:
            self._append({"touched": touched})
        if lost.any():
            self.lose(np.flatnonzero((self.columns["state"] == KEPT) & lost[self.columns["file"]]))

    def summarise(self) -> None:
        """Write what resuming and joining need, beside the ledger."""
        status = self.path.stat()
        kept = self.rows(KEPT)
        arrays = [pa.array(self.columns[name].reshape(self.num_rows, -1)[:, 0]) for name in ("state", "file", "at")]
        arrays.append(pa.array(self.columns["crc32"]))
        names = ["state", "file", "at", "crc32"]
        for name, parts in PARTS.items():
            arrays += [pa.array(self.columns[name][:, part].copy()) for part in range(len(parts))]
            names += parts
        words = {
            "ledger": [status.st_size, status.st_mtime_ns],
            "files": [list(file) for file in self.files],
            "used": np.unique(self.columns["file"][kept]).tolist(),
            "rejected": [[row, *why] for row, why in sorted(self.rejected.items())],
            "counts": [len(kept), len(self.rows(REJECTED)), len(self.rows(REMOVED))],
            "commits": self.commits,
            "report": self.report,
        }
        write_table(self.path.with_name(self.path.name.removesuffix(LEDGER) + SUMMARY),
                    pa.RecordBatch.from_arrays(arrays, names=names), words)  # fmt: skip

    def _append(self, record: dict[str, Any]) -> None:
        """Add a line, and take it in. Raises: LockedError: the lock was lost."""
        line = checked_json(record) + b"\n"
        latents = self.path.parents[1]
        with disk_errors(self.path), still_held(latents, self.lock or held_token(latents)):
            self.path.parent.mkdir(parents=True, exist_ok=True)
            new = not self.path.exists()
            with open(self.path, "ab+") as file:
                _cut_torn_line(file)
                file.write(line)
                file.flush()
                os.fsync(file.fileno())
            if new:
                sync_folder(self.path.parent)
        taken = self._take(orjson.loads(line))
        assert taken, record

    def _take(self, record: dict[str, Any]) -> bool:
        """Change what is known by a line; False where the line makes no sense."""
        try:
            if "done" in record:
                self.report = dict(record["done"])
            elif "lost" in record:
                self._set(record["lost"], OPEN)
            elif "removed" in record:
                self._set(record["removed"], REMOVED)
            elif "touched" in record:
                for number, mtime_ns in record["touched"]:
                    self.files[number] = self.files[number]._replace(mtime_ns=mtime_ns)
            elif "moved" in record:
                self._place(record["moved"], record)
            else:
                self._place(record["rows"], record)
                for name in ("crc32", "bucket", "size", "crop"):
                    if record["rows"]:
                        self.columns[name][record["rows"]] = record[name]
                self._set(record["rows"], KEPT)
                self._set([row for row, *_ in record["rejected"]], REJECTED)
                self.rejected |= {row: Rejection(*why) for row, *why in record["rejected"]}
                self.notes += record["notes"]
                self.commits.append((float(record["time"]), len(record["rows"])))
        except (ValueError, TypeError, KeyError, IndexError, AttributeError):
            return False
        return True

    def _place(self, rows: Sequence[int], record: dict[str, Any]) -> None:
        first = len(self.files)
        self.files += [LatentFile(*file) for file in record["files"]]
        if rows:
            self.columns["file"][rows] = np.array(record["file"], np.int32) + first
            self.columns["at"][rows] = record["at"]

    def _set(self, rows: Sequence[int], state: int) -> None:
        if rows:
            self.columns["state"][rows] = state
        for row in rows:
            self.rejected.pop(row, None)


@dataclass(frozen=True, slots=True)
class Summary:
    """A shard of which no row is open, as its summary tells it. `used`: which files hold kept rows."""

    path: Path
    files: list[LatentFile]
    used: list[int]
    rejected: list[tuple[int, Rejection]]
    num_kept: int
    num_rejected: int
    num_removed: int
    commits: list[tuple[float, int]]
    report: dict[str, Any]
    ledger: tuple[int, int]

    def table(self) -> pa.RecordBatch:
        """state, file, at, crc32, bucket_*, original_*, crop_* of every row. Raises: ShardError: damaged."""
        return read_table(self.path)


def read_summary(rows: Path) -> Summary | None:
    """A shard's summary, None where there is none that goes with the ledger as it is on disk."""
    path = shard_file(rows, SUMMARY)
    try:
        words = read_words(path)
        status = shard_file(rows, LEDGER).stat()
        if words["ledger"] != [status.st_size, status.st_mtime_ns]:
            return None
        rejected = [(row, Rejection(*why)) for row, *why in words["rejected"]]
        files = [LatentFile(*file) for file in words["files"]]
        kept, refused, removed = words["counts"]
        return Summary(
            path,
            files,
            words["used"],
            rejected,
            kept,
            refused,
            removed,
            words["commits"],
            words["report"],
            tuple(words["ledger"]),
        )
    except (ShardError, FileNotFoundError, KeyError, TypeError, ValueError):
        return None


def finished(rows: Path, latents: Path) -> Summary | None:
    """The summary of a shard that is done and whose files all have the recorded size and time, else None."""
    summary = read_summary(rows)
    if summary is None:
        return None
    folder = f"{latents}/"
    for number in summary.used:
        path, num_bytes, mtime_ns, _ = summary.files[number]
        try:
            status = os.stat(folder + path)
        except (FileNotFoundError, NotADirectoryError):
            return None
        if status.st_size != num_bytes or status.st_mtime_ns != mtime_ns:
            return None
    return summary


def _lines(path: Path) -> Iterator[dict[str, Any] | None]:
    """Every line that was not cut short, None for one whose checksum does not fit."""
    try:
        lines = path.read_bytes().split(b"\n")
    except FileNotFoundError:
        return
    for line in lines[:-1]:
        yield parse_checked(line)


def _cut_torn_line(file: Any) -> None:
    """Remove what a crash left after the last line break."""
    stop = file.seek(0, 2)
    while stop > 0:
        begin = max(0, stop - _BLOCK_BYTES)
        file.seek(begin)
        found = file.read(stop - begin).rfind(b"\n")
        if found >= 0:
            stop = begin + found + 1
            break
        stop = begin
    file.truncate(stop)
    file.seek(stop)


def _checksum(path: Path) -> int:
    """CRC-32 of a file, -1 where it cannot be read."""
    checksum = 0
    try:
        with open(path, "rb") as file:
            while block := file.read(1 << 20):
                checksum = crc32(block, checksum)
    except OSError:
        return -1
    return checksum
