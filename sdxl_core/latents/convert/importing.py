"""An sd-scripts cache taken over where it lies: every file is read and checked, then recorded; none is changed.

Afterwards it is a latent set with ledgers and an index: training checks what it reads, `verify` finds what rots, and
the conversions work. What it was made with is not known, so nothing is ever encoded into it.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, suppress
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import orjson
import pyarrow as pa

from sdxl_core.config import ImportLatentsConfig
from sdxl_core.errors import ConfigError, DataError, ShardError
from sdxl_core.files import atomic_writer, sha256_file, sync_folder, write_atomic
from sdxl_core.latents.ahead import worked_ahead
from sdxl_core.latents.bare import BareCache
from sdxl_core.latents.formats import LatentRecord, WrittenFile, inspect_per_image
from sdxl_core.latents.formats.record import is_finite
from sdxl_core.latents.index import IndexWriter
from sdxl_core.latents.ledger import KEPT, OPEN, PARTS, CommitGroup, LatentFile, Rejection, ShardLedger
from sdxl_core.latents.metadata import Block, blocks
from sdxl_core.latents.metadata import Entry as MetadataEntry
from sdxl_core.latents.rows import LEDGER_FOLDER, ROWS, identities, write_rows
from sdxl_core.latents.settings import fingerprint_of, settings_path
from sdxl_core.lock import output_lock
from sdxl_core.progress import Progress, no_progress
from sdxl_core.refs import LatentFilesRef
from sdxl_core.rejected import Rejected, update_rejected

STAGE, OTHER_METADATA = "import-latents", "meta_lat.imported.json"
SETTINGS = {"layout": "per_image", "made_by": "imported"}


class Entry(NamedTuple):
    """A picture that is asked for. `file`: below the folder, "" where there is none.   block, number: its metadata."""

    key: str
    file: str
    block: Block | None
    number: int

    @property
    def told(self) -> MetadataEntry:
        return MetadataEntry() if self.block is None else self.block.entries[self.number]

    def text(self, width_px: int, height_px: int) -> bytes:
        """As json.dumps(…, indent=2) has it in meta_lat.json."""
        if self.block is not None:
            return self.block.with_resolution(self.number, width_px, height_px)
        return json.dumps({self.key: {"train_resolution": [width_px, height_px]}}, indent=2)[2:-2].encode("ascii")


def import_latents(config: ImportLatentsConfig, *, progress: Progress = no_progress) -> LatentFilesRef:
    """Check and record every file; what is recorded already and has not changed is not read again.

    Writes ledgers and index beside the files, and rejected.jsonl and meta_lat.json (or meta_lat.imported.json, where
    there is another) in the folder above. Holds the entries of one ledger at a time, and what is refused.
    Raises: ConfigError: no such folder; it is a set of ours.   DataError: no file is good.   LockedError.
    """
    latents = config.path
    if not latents.is_dir():
        raise ConfigError(f"path = {latents}: there is no such folder. Name the one that holds the .npz files.")
    if next(BareCache(latents).files(), None) is None:
        raise DataError(f"{latents}: holds no .npz file of latents. Name the folder that sd-scripts cached them in.")
    with output_lock(latents, purpose=STAGE):
        work = _Import(config, _remember(latents), progress)
        with suppress(_NothingGood):
            work.run()
        rejected = latents.parent / "rejected.jsonl"
        update_rejected(rejected, STAGE, work.rejected)
        if not work.num_kept:
            raise DataError(
                f"{latents}: none of its {work.num_seen} latents can be used; {rejected} tells why each was refused."
            )
        metadata = _settle_metadata(latents.parent)
    return LatentFilesRef(
        what=STAGE,
        path=latents,
        num_rows=work.num_kept,
        num_files=work.num_kept,
        num_bytes=work.num_bytes,
        metadata=metadata,
        num_rejected=len(work.rejected),
        rejected=rejected,
    )


class _NothingGood(Exception):
    """Ends the writers of metadata and index so that they leave what was there."""


class _Import:
    """One pass: shard after shard is checked, and what is good goes into metadata and index."""

    def __init__(self, config: ImportLatentsConfig, fingerprint: str, progress: Progress) -> None:
        self._config, self._fingerprint, self._progress = config, fingerprint, progress
        self.num_seen = self.num_kept = self.num_bytes = 0
        self.rejected: list[Rejected] = []

    def run(self) -> None:
        latents, names, digest = self._config.path, [], hashlib.sha256()
        with ExitStack() as stack:
            out = stack.enter_context(atomic_writer(latents.parent / OTHER_METADATA))
            index = stack.enter_context(IndexWriter(latents, fingerprint=self._fingerprint, made_from=STAGE))
            for entries in _chunks(_entries(self._config), self._config.shard_size):
                shard = _Shard(latents, entries, self._config, self._fingerprint)
                for count in shard.check():
                    self._progress("import", self.num_seen + count, self.num_seen + len(entries))
                names.append(shard.ledger.path.name.split(".")[0])
                for piece in shard.texts(is_first=not self.num_kept):
                    out.write(piece)
                    digest.update(piece)
                shard.add_to(index)
                self._count(shard)
            if not self.num_kept:
                raise _NothingGood
            out.write(b"\n}")
            digest.update(b"\n}")
            index.finish(metadata_sha256=digest.hexdigest())
        _forget_others(latents, names)

    def _count(self, shard: _Shard) -> None:
        self.num_seen += len(shard.entries)
        self.num_kept += len(shard.ledger.rows(KEPT))
        kept = np.unique(shard.ledger.columns["file"][shard.ledger.rows(KEPT)]).tolist()
        self.num_bytes += sum(shard.ledger.files[number].num_bytes for number in kept)
        self.rejected += shard.rejected()


def _settle_metadata(folder: Path) -> Path:
    """Where the metadata is: meta_lat.json, unless there is one of other content, which is left alone."""
    made, path = folder / OTHER_METADATA, folder / "meta_lat.json"
    if path.exists() and sha256_file(path) != sha256_file(made):
        return made
    if path.exists():
        made.unlink()
    else:
        os.replace(made, path)
        sync_folder(folder)
    return path


def _remember(latents: Path) -> str:
    """Raises: ConfigError: the folder is a set that cache-latents or convert-latents made."""
    path = settings_path(latents)
    if path.exists():
        try:
            is_ours = orjson.loads(path.read_bytes()) == SETTINGS
        except orjson.JSONDecodeError:
            is_ours = False
        if not is_ours:
            raise ConfigError(f"{latents}: is a latent set already. To check it: sdxl-flows verify {latents}.")
    else:
        write_atomic(path, orjson.dumps(SETTINGS, option=orjson.OPT_INDENT_2))
    return fingerprint_of(dict(SETTINGS))


def _entries(config: ImportLatentsConfig) -> Iterator[Entry]:
    """What the metadata asks for in its order, or every file."""
    cache, prefix = BareCache(config.path), f"{config.path}/"
    if config.metadata is None:
        for key, path in cache.files():
            yield Entry(key, path.removeprefix(prefix), None, 0)
        return
    for block in blocks(config.metadata):
        for number, key in enumerate(block.keys):
            found = str(cache.find(key) or "")
            yield Entry(key, found.removeprefix(prefix) if found.startswith(prefix) else "", block, number)


def _chunks(entries: Iterator[Entry], size: int) -> Iterator[list[Entry]]:
    while chunk := list(islice(entries, size)):
        yield chunk


def _forget_others(latents: Path, names: Sequence[str]) -> None:
    """Ledgers of an import of other files go."""
    for path in (latents / LEDGER_FOLDER).iterdir():
        if path.name.split(".")[0] not in {*names, "settings"}:
            path.unlink(missing_ok=True)


class _Shard:
    """Some of the entries, with their rows file and ledger."""

    def __init__(self, latents: Path, entries: Sequence[Entry], config: ImportLatentsConfig, fingerprint: str) -> None:
        self.latents, self.entries, self._config = latents, entries, config
        folder = latents / LEDGER_FOLDER
        _, path = write_rows(
            folder, _rows(entries), roots=(), commit_size=config.commit_size, fingerprint=fingerprint, taken=()
        )
        self.ledger = ShardLedger.read(path, len(entries))
        self.ledger.settle(latents)
        if self.ledger.rejected:  # they may have been replaced meanwhile
            self.ledger.lose(sorted(self.ledger.rejected))

    def check(self) -> Iterator[int]:
        """Read what is not recorded yet, and record it group by group. Yields how many entries are done."""
        size = self._config.commit_size
        with ThreadPoolExecutor(self._config.threads or 2 * (os.cpu_count() or 1)) as pool:
            for number in sorted({row // size for row in self.ledger.rows(OPEN).tolist()}):
                rows = [row for row in self.ledger.rows(OPEN).tolist() if row // size == number]
                found = worked_ahead(pool, lambda row: _inspect(self.latents, self.entries[row]), rows, ahead=64)
                self._commit(number, list(zip(rows, found, strict=True)))
                yield min((number + 1) * size, len(self.entries))
        if not self.ledger.is_done:
            self.ledger.close({"images_per_s": 0.0, "bound_by": "read", "seconds": {}, "device": "imported"})

    def rejected(self) -> Iterator[Rejected]:
        for row, why in sorted(self.ledger.rejected.items()):
            yield Rejected(stage=STAGE, key=self.entries[row].key, reason=why.reason, detail=why.detail)

    def texts(self, *, is_first: bool) -> Iterator[bytes]:
        """The good entries in meta_lat.json, with what goes before them."""
        bucket = self.ledger.columns["bucket"]
        for row in self.ledger.rows(KEPT).tolist():
            yield b"{\n" if is_first else b",\n"
            yield self.entries[row].text(*bucket[row].tolist())
            is_first = False

    def add_to(self, index: IndexWriter) -> None:
        kept = self.ledger.rows(KEPT)
        columns = {name: column[kept] for name, column in self.ledger.columns.items()}
        files = [self.ledger.files[number] for number in columns["file"].tolist()]
        paths = pa.array([file.path for file in files], pa.string())
        first = index.add_files(paths, np.array([file.num_bytes for file in files], np.int64), "per_image")
        told = [self.entries[row].told for row in kept.tolist()]
        parts = {
            name: columns[whole][:, place].copy() for whole, names in PARTS.items() for place, name in enumerate(names)
        }
        index.add(
            {
                "key": [self.entries[row].key for row in kept.tolist()],
                "tags": [one.tags for one in told],
                "caption": [one.caption for one in told],
                "file": np.arange(first, first + len(kept), dtype=np.int32),
                "row": columns["at"],
                "crc32": columns["crc32"],
                **parts,
            }
        )

    def _commit(self, number: int, found: list[tuple[int, _Checked | Rejection]]) -> None:
        good = [(row, one) for row, one in found if isinstance(one, _Checked)]
        self.ledger.commit(
            CommitGroup(
                number=number,
                files=[one.file for _, one in good],
                rows=[row for row, _ in good],
                file=list(range(len(good))),
                at=[-1] * len(good),
                crc32=[one.file.crc32 for _, one in good],
                bucket=[one.bucket for _, one in good],
                size=[one.size for _, one in good],
                crop=[one.crop_ltrb for _, one in good],
                rejected={row: one for row, one in found if isinstance(one, Rejection)},
            )
        )


class _Checked(NamedTuple):
    """A good file: what it is, and what the ledger keeps of its picture."""

    file: LatentFile
    bucket: tuple[int, int]
    size: tuple[int, int]
    crop_ltrb: tuple[float, float, float, float]


def _rows(entries: Sequence[Entry]) -> pa.RecordBatch:
    """The listing of a shard: the files stand for the pictures, which are not known."""
    count = len(entries)
    columns: dict[str, Any] = {
        "key": [entry.key.encode("utf-8", "replace").decode() for entry in entries],
        "name": [entry.file.removesuffix(".npz") or entry.key for entry in entries],
        "root": [0] * count,
        "image": [entry.file for entry in entries],
        "tar": [None] * count,
        "offset": [0] * count,
        "num_bytes": [0] * count,
        "mtime_ns": [0] * count,
        "identity": np.zeros(count, np.uint64),
    }
    arrays = [pa.array(columns[field.name], field.type) for field in ROWS]
    batch = pa.RecordBatch.from_arrays(arrays, schema=ROWS)
    arrays[-1] = pa.array(identities(batch), pa.uint64())
    return pa.RecordBatch.from_arrays(arrays, schema=ROWS)


def _inspect(latents: Path, entry: Entry) -> _Checked | Rejection:
    """Read a file whole, and say what it is or why it is refused."""
    if not entry.file:
        return Rejection("missing_latents", f"no .npz of that name below {latents}")
    try:
        mtime_ns = (latents / entry.file).stat().st_mtime_ns
        record, written = inspect_per_image(latents / entry.file)
    except (ShardError, OSError) as error:
        return Rejection("bad_latents", str(error))
    problem = _problem(record, entry)
    if problem is not None:
        return problem
    size = record.original_width_px, record.original_height_px
    return _Checked(_as_written(entry, written, mtime_ns), record.bucket, size, record.crop_ltrb)


def _as_written(entry: Entry, written: WrittenFile, mtime_ns: int) -> LatentFile:
    return LatentFile(entry.file, written.num_bytes, mtime_ns, written.crc32)


def _problem(record: LatentRecord, entry: Entry) -> Rejection | None:
    infinite = [name for name, array in record.arrays() if not is_finite(array)]
    if infinite or not np.isfinite(record.crop_ltrb).all():
        return Rejection("nan_latent", f"values of {', '.join(infinite) or 'crop_ltrb'} are not finite")
    told = entry.told.train_resolution
    if told is not None and tuple(told) != record.bucket:
        return Rejection("wrong_shape", f"latents of a bucket of {record.bucket}, and the metadata says {tuple(told)}")
    if min(record.bucket) < 8 or min(record.original_width_px, record.original_height_px) < 1:
        return Rejection("wrong_shape", f"bucket {record.bucket}, original size {record.original_width_px} x "
                         f"{record.original_height_px}")  # fmt: skip
    return None
