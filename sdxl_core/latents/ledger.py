"""What a shard has finished: one JSON line a commit group, appended after the group's files were synced.

A line that is damaged does not count, and neither does a row whose file is gone or altered (`settle`). The last line
says that the whole shard is done.
"""

from __future__ import annotations

import os
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import orjson

from sdxl_core.errors import ShardError
from sdxl_core.files import disk_errors, sync_folder, write_atomic
from sdxl_core.latents.formats import read_per_image

LEDGER_FOLDER = ".ledger"


@dataclass(frozen=True, slots=True, kw_only=True)
class LatentRow:
    """One written latent file. `file`: POSIX path below the latents folder; `bucket`: width and height in pixels."""

    key: str
    file: str
    num_bytes: int
    mtime_ns: int
    crc32: int
    bucket: tuple[int, int]
    ar_error: float

    def mtime_on_disk(self, latents: Path) -> int | None:
        """When its file was last written (ns), None where it is gone or of another size."""
        try:
            status = os.stat(latents / self.file)
        except (FileNotFoundError, NotADirectoryError):
            return None
        return status.st_mtime_ns if status.st_size == self.num_bytes else None

    def holds_what_was_written(self, latents: Path) -> bool:
        """Whether the file's latents have the recorded checksum; reads the file."""
        try:
            return read_per_image(latents / self.file).crc32() == self.crc32
        except ShardError:
            return False


@dataclass(frozen=True, slots=True, kw_only=True)
class Group:
    """A commit group: its number in the shard's plan, what it wrote, and what it rejected as (key, reason, detail)."""

    number: int
    rows: tuple[LatentRow, ...]
    rejected: tuple[tuple[str, str, str], ...]
    notes: tuple[str, ...] = ()


@dataclass(slots=True, kw_only=True)
class ShardLedger:
    """A shard's ledger as read: groups by number (a later line wins) and the closing record, None while unfinished.

    `is_damaged`: it has lines that are none of ours; then the shard does not count as done, and `settle` drops them.
    """

    path: Path
    groups: dict[int, Group] = field(default_factory=dict)
    done: dict[str, Any] | None = None
    is_damaged: bool = False

    @classmethod
    def read(cls, path: Path) -> ShardLedger:
        """Every whole line of the file; an empty ledger where there is none."""
        ledger = cls(path=path)
        try:
            lines = path.read_bytes().split(b"\n")
        except FileNotFoundError:
            return ledger
        for line in lines[:-1]:  # what follows the last line break was cut short
            try:
                record = orjson.loads(line)
                if "done" in record:
                    ledger.done = _closing(record["done"])
                else:
                    ledger.groups[int(record["group"])] = _group(record)
            except (ValueError, TypeError, KeyError, AttributeError):
                ledger.is_damaged = True
        if ledger.is_damaged:
            ledger.done = None
        return ledger

    def rows(self) -> list[LatentRow]:
        return [row for number in sorted(self.groups) for row in self.groups[number].rows]

    def rejected(self) -> list[tuple[str, str, str]]:
        """(key, reason, detail) of every rejected picture: those of the plan, then those of the groups."""
        planned = [(key, reason, detail) for key, reason, detail in (self.done or {}).get("rejected", [])]
        return planned + [row for number in sorted(self.groups) for row in self.groups[number].rejected]

    def settle(self, latents: Path) -> None:
        """Bring the ledger in line with the files on disk, rewriting it where they differ.

        A file of the recorded size and time is believed. One of another time (a copied or restored cache) is read, and
        believed if its checksum fits. A group that has lost a file is forgotten, and the closing record with it.
        """
        kept: dict[int, Group] = {}
        for number, group in self.groups.items():
            rows = [_believed(row, latents) for row in group.rows]
            if None not in rows:
                kept[number] = replace(group, rows=tuple(row for row in rows if row is not None))
        if kept == self.groups and not self.is_damaged:
            return
        self.done = self.done if len(kept) == len(self.groups) else None
        self.groups, self.is_damaged = kept, False
        records = [_group_record(kept[number]) for number in sorted(kept)]
        write_atomic(self.path, map(_line, records + ([{"done": self.done}] if self.done is not None else [])))

    def add(self, group: Group) -> None:
        """Record a group whose files are synced."""
        self._append(_group_record(group))
        self.groups[group.number] = group

    def close(self, record: dict[str, Any]) -> None:
        """Record that the shard is done."""
        self._append({"done": record})
        self.done = record

    def _append(self, record: dict[str, Any]) -> None:
        with disk_errors(self.path):
            self.path.parent.mkdir(parents=True, exist_ok=True)
            new = not self.path.exists()
            with open(self.path, "ab+") as file:
                _cut_torn_line(file)
                file.write(_line(record))
                file.flush()
                os.fsync(file.fileno())
            if new:
                sync_folder(self.path.parent)


def _believed(row: LatentRow, latents: Path) -> LatentRow | None:
    mtime_ns = row.mtime_on_disk(latents)
    if mtime_ns == row.mtime_ns:
        return row
    if mtime_ns is not None and row.holds_what_was_written(latents):
        return replace(row, mtime_ns=mtime_ns)
    return None


def _cut_torn_line(file: Any) -> None:
    """Remove what a crash left after the last line break."""
    file.seek(0)
    whole = file.read().rfind(b"\n") + 1
    file.truncate(whole)
    file.seek(whole)


def _line(record: dict[str, Any]) -> bytes:
    return orjson.dumps(record, option=orjson.OPT_APPEND_NEWLINE)


def _group_record(group: Group) -> dict[str, Any]:
    rows = [[getattr(row, name) for name in LatentRow.__slots__] for row in group.rows]
    return {"group": group.number, "rows": rows, "rejected": group.rejected, "notes": group.notes}


def _closing(record: dict[str, Any]) -> dict[str, Any]:
    """The closing record, its rejections checked."""
    return record | {"rejected": [(str(key), str(reason), str(detail)) for key, reason, detail in record["rejected"]]}


def _group(record: dict[str, Any]) -> Group:
    rows = (dict(zip(LatentRow.__slots__, row, strict=True)) for row in record["rows"])
    return Group(
        number=record["group"],
        rows=tuple(LatentRow(**row | {"bucket": tuple(row["bucket"])}) for row in rows),
        rejected=tuple((key, reason, detail) for key, reason, detail in record["rejected"]),
        notes=tuple(record["notes"]),
    )
