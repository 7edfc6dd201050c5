"""An sd-scripts cache taken over where it lies: every file is read and checked, then recorded; none is changed.

Afterwards it is a latent set with ledgers and an index: training checks what it reads, `verify` finds what rots, and
the conversions work. What it was made with is not known, so nothing is ever encoded into it.
"""

from __future__ import annotations

import json
import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import orjson
import pyarrow as pa

from sdxl_core.config import ImportLatentsConfig
from sdxl_core.dataset.metadata import read_metadata
from sdxl_core.errors import ConfigError, DataError, ShardError
from sdxl_core.files import digest_of, sha256_file, write_atomic
from sdxl_core.latents.bare import BareCache
from sdxl_core.latents.formats import LatentRecord, WrittenFile, inspect_per_image
from sdxl_core.latents.formats.record import is_finite
from sdxl_core.latents.index import IndexWriter
from sdxl_core.latents.ledger import KEPT, OPEN, CommitGroup, LatentFile, Rejection, ShardLedger
from sdxl_core.latents.rows import LEDGER_FOLDER, ROWS, identities, write_rows
from sdxl_core.latents.settings import fingerprint_of, settings_path
from sdxl_core.lock import output_lock
from sdxl_core.progress import Progress, no_progress
from sdxl_core.refs import LatentFilesRef
from sdxl_core.rejected import Rejected, update_rejected

STAGE = "import-latents"
SETTINGS = {"layout": "per_image", "made_by": "imported"}


class Entry(NamedTuple):
    """A picture that is asked for. `file`: below the folder, "" where there is none.   told: its metadata."""

    key: str
    file: str
    told: dict[str, Any]


def import_latents(config: ImportLatentsConfig, *, progress: Progress = no_progress) -> LatentFilesRef:
    """Check and record every file; what is recorded already and has not changed is not read again.

    Writes ledgers and index beside the files, and rejected.jsonl and meta_lat.json (or meta_lat.imported.json, where
    there is another) in the folder above.
    Raises: ConfigError: no such folder; it is a set of ours.   DataError: no file is good.   LockedError.
    """
    latents = config.path
    if not latents.is_dir():
        raise ConfigError(f"path = {latents}: there is no such folder. Name the one that holds the .npz files.")
    with output_lock(latents, purpose=STAGE):
        fingerprint = _remember(latents)
        entries = list(_entries(config))
        if not entries:
            raise DataError(f"{latents}: holds no .npz file of latents.")
        shards = [
            _Shard(latents, entries[start : start + config.shard_size], config, fingerprint)
            for start in range(0, len(entries), config.shard_size)
        ]
        done = 0
        for shard in shards:
            for count in shard.check():
                progress("import", done + count, len(entries))
            done += len(shard.entries)
        rejected = [one for shard in shards for one in shard.rejected()]
        update_rejected(latents.parent / "rejected.jsonl", STAGE, rejected)
        if len(rejected) == len(entries):
            raise DataError(
                f"{latents}: none of its {len(entries)} latents can be used; {latents.parent / 'rejected.jsonl'} tells "
                f"why each was refused."
            )
        _forget_others(latents, shards)
        metadata = _write_metadata(config, shards)
        _write_index(latents, shards, fingerprint, sha256_file(metadata))
    return LatentFilesRef(
        what=STAGE,
        path=latents,
        num_rows=len(entries) - len(rejected),
        num_files=len(entries) - len(rejected),
        num_bytes=sum(shard.num_bytes for shard in shards),
        metadata=metadata,
        num_rejected=len(rejected),
        rejected=latents.parent / "rejected.jsonl",
    )


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
    cache = BareCache(config.path)
    if config.metadata is None:
        for key, path in cache.files():
            yield Entry(key, path.relative_to(config.path).as_posix(), {})
        return
    for key, told in read_metadata(config.metadata).items():
        found = cache.find(key)
        below = found is not None and found.is_relative_to(config.path)
        yield Entry(key, found.relative_to(config.path).as_posix() if found is not None and below else "", told)


def _forget_others(latents: Path, shards: Sequence[_Shard]) -> None:
    """Ledgers of an import of other files go."""
    current = {shard.ledger.path.name.split(".")[0] for shard in shards} | {"settings"}
    for path in (latents / LEDGER_FOLDER).iterdir():
        if path.name.split(".")[0] not in current:
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
                found = _ahead(pool, lambda row: _inspect(self.latents, self.entries[row]), rows)
                self._commit(number, list(zip(rows, found, strict=True)))
                yield min((number + 1) * size, len(self.entries))
        if not self.ledger.is_done:
            self.ledger.close({"images_per_s": 0.0, "bound_by": "read", "seconds": {}, "device": "imported"})

    def rejected(self) -> Iterator[Rejected]:
        for row, why in sorted(self.ledger.rejected.items()):
            yield Rejected(stage=STAGE, key=self.entries[row].key, reason=why.reason, detail=why.detail)

    @property
    def num_bytes(self) -> int:
        return sum(file.num_bytes for file in self.ledger.files)

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
    told = entry.told.get("train_resolution")
    if told is not None and tuple(told) != record.bucket:
        return Rejection("wrong_shape", f"latents of a bucket of {record.bucket}, and the metadata says {tuple(told)}")
    if min(record.bucket) < 8 or min(record.original_width_px, record.original_height_px) < 1:
        return Rejection("wrong_shape", f"bucket {record.bucket}, original size {record.original_width_px} x "
                         f"{record.original_height_px}")  # fmt: skip
    return None


def _ahead(
    pool: ThreadPoolExecutor, work: Callable[[int], _Checked | Rejection], rows: Iterable[int]
) -> Iterator[_Checked | Rejection]:
    """`work` of every row, in order, with a bounded number under way."""
    waiting: deque[Future[_Checked | Rejection]] = deque()
    for row in rows:
        waiting.append(pool.submit(work, row))
        if len(waiting) > 64:
            yield waiting.popleft().result()
    while waiting:
        yield waiting.popleft().result()


def _write_metadata(config: ImportLatentsConfig, shards: Sequence[_Shard]) -> Path:
    """meta_lat.json of the good ones, byte for byte as sd-scripts has it; one with other content is left alone."""
    path = config.path.parent / "meta_lat.json"
    if path.exists():
        before = sha256_file(path)
        if before == digest_of_pieces(_metadata(shards)):
            return path
        path = config.path.parent / "meta_lat.imported.json"
    write_atomic(path, _metadata(shards))
    return path


def digest_of_pieces(pieces: Iterable[bytes]) -> str:
    """SHA-256 of what the pieces make together."""
    import hashlib

    digest = hashlib.sha256()
    for piece in pieces:
        digest.update(piece)
    return digest.hexdigest()


def _metadata(shards: Sequence[_Shard]) -> Iterator[bytes]:
    """The bytes of json.dumps(…, indent=2)."""
    separator = "{\n"
    for shard in shards:
        bucket = shard.ledger.columns["bucket"]
        for row in shard.ledger.rows(KEPT).tolist():
            entry = shard.entries[row]
            whole = json.dumps({entry.key: entry.told | {"train_resolution": bucket[row].tolist()}}, indent=2)
            yield (separator + whole[2:-2]).encode("ascii")
            separator = ",\n"
    yield b"\n}"


def _write_index(latents: Path, shards: Sequence[_Shard], fingerprint: str, metadata_sha256: str) -> None:
    made_from = digest_of(fingerprint, *(shard.ledger.path.name for shard in shards))
    with IndexWriter(latents, fingerprint=fingerprint, made_from=made_from) as index:
        for shard in shards:
            kept = shard.ledger.rows(KEPT)
            columns = {name: column[kept] for name, column in shard.ledger.columns.items()}
            files = [shard.ledger.files[number] for number in columns["file"].tolist()]
            first = index.add_files(
                pa.array([file.path for file in files], pa.string()), np.array([file.num_bytes for file in files]),
                "per_image",
            )  # fmt: skip
            told = [shard.entries[row].told for row in kept.tolist()]
            sides = {
                f"{what}_{side}_px": columns[name][:, place].copy()
                for what, name in (("bucket", "bucket"), ("original", "size"))
                for place, side in enumerate(("width", "height"))
            }
            crops = {
                f"crop_{side}": columns["crop"][:, place].copy()
                for place, side in enumerate(("left", "top", "right", "bottom"))
            }
            index.add(
                {
                    "key": [shard.entries[row].key for row in kept.tolist()],
                    "tags": [one.get("tags") for one in told],
                    "caption": [one.get("caption") for one in told],
                    "file": np.arange(first, first + len(kept), dtype=np.int32),
                    "row": columns["at"],
                    "crc32": columns["crc32"],
                    **sides,
                    **crops,
                }
            )
        index.finish(metadata_sha256=metadata_sha256)
