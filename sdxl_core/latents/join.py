"""From finished shards to meta_lat.json and the index: one pass over the metadata, in constant memory."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack, suppress
from dataclasses import asdict, dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from sdxl_core.config import CacheLatentsConfig
from sdxl_core.errors import DataError, ShardError
from sdxl_core.files import atomic_writer, digest_of, remove_stale_partials, sha256_file, write_atomic
from sdxl_core.latents.index import FileNumbers, IndexWriter, LatentIndex
from sdxl_core.latents.ledger import KEPT, PARTS, REJECTED, LatentFile, Rejection, finished, read_summary
from sdxl_core.latents.metadata import Block, blocks
from sdxl_core.latents.plan import STAGE, LatentPlan
from sdxl_core.latents.rows import LEDGER_FOLDER
from sdxl_core.latents.shards import shown
from sdxl_core.latents.tables import checked_json, parse_checked
from sdxl_core.lock import held_token, still_held
from sdxl_core.progress import Progress, no_progress
from sdxl_core.refs import FileRef, LatentSetRef, ShardRef
from sdxl_core.rejected import Rejected, count_reasons, read_rejected, rejected_line, update_rejected

Ints = np.ndarray[Any, np.dtype[Any]]
SET, SET_REJECTED = "set.json", "set.rejected.jsonl"
REMOVED_BY_HAND = Rejection("removed", "taken out with remove-latents; cache-latents encodes it again if it is wanted")
_SHARDS_OPEN = 64
_COLUMNS = ("crc32", *(name for names in PARTS.values() for name in names))


@dataclass(frozen=True, slots=True)
class _Joined:
    """What the last join made, in `.ledger/set.json`. `made_from`: identity of the plan and its shards' ledgers.

    `metadata_is`: size and time of meta_lat.json.   `rejected_sha256`: of `.ledger/set.rejected.jsonl`.
    """

    made_from: str
    num_kept: int
    num_rejected: int
    ar_error_sum: float
    buckets: dict[str, int]
    metadata_sha256: str
    metadata_is: list[int]
    rejected_sha256: str


def join_latents(config: CacheLatentsConfig, plan: LatentPlan, *, progress: Progress = no_progress) -> LatentSetRef:
    """Write meta_lat.json, the index and rejected.jsonl, in the order of the metadata; nothing where they are there.

    Raises: DataError: no picture could be encoded; the metadata changed meanwhile.   ShardError: a shard is unfinished.
    DiskFullError.
    """
    latents = config.out / "latents"
    folder = latents / LEDGER_FOLDER
    stamps = [_stamp(shard, latents) for shard in plan.shards]
    unfinished = [shard.index for shard, stamp in zip(plan.shards, stamps, strict=True) if stamp is None]
    if unfinished:
        raise _unfinished(config, unfinished, len(stamps))
    made_from = digest_of(
        plan.digest, *(f"{shard.digest}|{stamp}" for shard, stamp in zip(plan.shards, stamps, strict=True))
    )
    joined = _last_joined(config, made_from)
    if joined is None:
        joined = _Join(config, plan, made_from).run(progress)
        write_atomic(folder / SET, checked_json(asdict(joined)))
    rejected_path = config.out / "rejected.jsonl"
    rejected = read_rejected(folder / SET_REJECTED)
    update_rejected(rejected_path, STAGE, rejected)
    if not joined.num_kept:
        reasons = ", ".join(f"{count} {reason}" for reason, count in count_reasons(rejected).items())
        raise DataError(
            f"{config.metadata}: none of its {len(rejected)} pictures could be encoded ({reasons}). {rejected_path} "
            f"tells each one's reason; missing_image means that source = {config.source} is not their folder."
        )
    return LatentSetRef(
        path=latents,
        metadata=FileRef(
            path=config.out / "meta_lat.json", sha256=joined.metadata_sha256, num_bytes=joined.metadata_is[0]
        ),
        fingerprint=plan.fingerprint,
        num_seen=plan.num_seen,
        num_kept=joined.num_kept,
        num_rejected=joined.num_rejected,
        mean_ar_error=joined.ar_error_sum / joined.num_kept,
        buckets=joined.buckets,
        rejected=rejected_path,
        parents=(plan.metadata_sha256,),
    )


def _stamp(shard: ShardRef, latents: Path) -> tuple[int, int] | None:
    """Size and time of a finished shard's ledger, None where it is not finished or its files are not as written."""
    summary = finished(shard.path, latents)
    return None if summary is None else summary.ledger


def _unfinished(config: CacheLatentsConfig, unfinished: list[int], num_shards: int) -> ShardError:
    where, numbers = config.out / "latents" / LEDGER_FOLDER, shown(unfinished)
    if config.only_shards and set(unfinished).isdisjoint(config.only_shards):
        return ShardError(
            f"{where}: the shards of only_shards ({shown(config.only_shards)}) are finished. Of all {num_shards}, "
            f"{len(unfinished)} are not: {numbers}. So meta_lat.json and the index stay as they were. Run again with "
            f"their numbers, or without any: then all are looked at."
        )
    return ShardError(
        f"{where}: shard {numbers} is not finished, or its files were changed meanwhile. Run the same command again; "
        f"it encodes what is not recorded."
    )


def _last_joined(config: CacheLatentsConfig, made_from: str) -> _Joined | None:
    """What the last run joined, if it was made from the same and its files are as they were left."""
    folder = config.out / "latents" / LEDGER_FOLDER
    try:
        told = parse_checked((folder / SET).read_bytes())
        if told is None:
            return None
        joined = _Joined(**told)
        if joined.made_from != made_from or sha256_file(folder / SET_REJECTED) != joined.rejected_sha256:
            return None
        if not joined.num_kept:
            return joined
        status = (config.out / "meta_lat.json").stat()
        is_there = joined.metadata_is == [status.st_size, status.st_mtime_ns]
        return joined if is_there and LatentIndex.open(config.out / "latents").made_from == made_from else None
    except (OSError, ValueError, TypeError, DataError):
        return None


class _Shard(NamedTuple):
    """A finished shard, open."""

    columns: dict[str, Ints]
    rejected: dict[int, Rejection]
    files: list[LatentFile]


class _Join:
    """One pass over the metadata."""

    def __init__(self, config: CacheLatentsConfig, plan: LatentPlan, made_from: str) -> None:
        self._config, self._plan, self._made_from = config, plan, made_from
        self._latents = config.out / "latents"
        self._shard = lru_cache(maxsize=_SHARDS_OPEN)(self._open)
        self._buckets: Counter[tuple[int, int]] = Counter()
        self._ar_error_sum, self._num_kept, self._num_rejected = 0.0, 0, 0

    def run(self, progress: Progress) -> _Joined:
        self._plan.check_metadata(self._config.metadata)
        places = self._plan.places()
        shard, row = places["shard"].to_numpy(), places["row"].to_numpy()
        path = self._config.out / "meta_lat.json"
        digest = hashlib.sha256()
        remove_stale_partials(self._latents, name="*")
        with suppress(_NothingKept), ExitStack() as stack:
            out = stack.enter_context(atomic_writer(path))
            index = stack.enter_context(
                IndexWriter(self._latents, fingerprint=self._plan.fingerprint, made_from=self._made_from)
            )
            numbers = FileNumbers(index, self._config.layout)
            start = 0
            with atomic_writer(self._latents / LEDGER_FOLDER / SET_REJECTED) as rejected:
                without_picture = iter(read_rejected(self._plan.rejected))
                for block in blocks(self._config.metadata):
                    stop = start + len(block.keys)
                    columns = self._columns(shard[start:stop], row[start:stop], numbers)
                    for piece in self._texts(block, columns):
                        out.write(piece)
                        digest.update(piece)
                    for line in self._rejections(block, columns, without_picture):
                        rejected.write(rejected_line(line))
                    self._add(index, block, columns)
                    start = stop
                    progress("join", start, self._plan.num_seen)
            self._plan.check_metadata(self._config.metadata)
            if not self._num_kept:
                raise _NothingKept
            out.write(b"\n}")
            digest.update(b"\n}")
            index.finish(metadata_sha256=digest.hexdigest())
            with still_held(self._latents, held_token(self._latents)):
                pass  # what follows gives files their names
        status = path.stat() if self._num_kept else None
        is_now = [status.st_size, status.st_mtime_ns] if status else [0, 0]
        return self._result(digest.hexdigest(), is_now)

    def _result(self, sha256: str, metadata_is: list[int]) -> _Joined:
        buckets = {f"{width}x{height}": self._buckets[width, height] for width, height in sorted(self._buckets)}
        return _Joined(
            made_from=self._made_from,
            num_kept=self._num_kept,
            num_rejected=self._num_rejected,
            ar_error_sum=self._ar_error_sum,
            buckets=buckets,
            metadata_sha256=sha256,
            metadata_is=metadata_is,
            rejected_sha256=sha256_file(self._latents / LEDGER_FOLDER / SET_REJECTED),
        )

    def _open(self, number: int) -> _Shard:
        summary = read_summary(self._plan.shards[number].path)
        if summary is None:
            raise ShardError(f"{self._plan.shards[number].path}: its ledger was changed meanwhile. Run again.")
        table = summary.table()
        columns = {name: table[name].to_numpy() for name in table.schema.names}
        return _Shard(columns, dict(summary.rejected), summary.files)

    def _columns(self, shard: Ints, row: Ints, numbers: FileNumbers) -> dict[str, Ints]:
        """What shards know of some entries, and `shard`, `row` and `file` in the index; state 255: no picture."""
        num_entries = len(shard)
        found: dict[str, Ints] = {"shard": shard, "row": row, "state": np.full(num_entries, 255, np.uint8)}
        for number in np.unique(shard[shard >= 0]).tolist():
            mine = np.flatnonzero(shard == number)
            known, _, files = self._shard(number)
            for name in ("state", "file", "at", *_COLUMNS):
                found.setdefault(name, np.zeros(num_entries, known[name].dtype))[mine] = known[name][row[mine]]
            kept = mine[found["state"][mine] == KEPT]
            found["file"][kept] = numbers.of(number, files, found["file"][kept])
        return found

    def _texts(self, block: Block, columns: dict[str, Ints]) -> Iterator[bytes]:
        """The entries that have latents, with what goes before them in the JSON."""
        kept = np.flatnonzero(columns["state"] == KEPT).tolist()
        if kept:
            width, height = columns["bucket_width_px"], columns["bucket_height_px"]
            yield b",\n" if self._num_kept else b"{\n"
            yield b",\n".join(block.with_resolution(entry, int(width[entry]), int(height[entry])) for entry in kept)

    def _rejections(
        self, block: Block, columns: dict[str, Ints], without_picture: Iterator[Rejected]
    ) -> Iterator[Rejected]:
        state, shard, row = columns["state"], columns["shard"], columns["row"]
        for entry in np.flatnonzero(state != KEPT).tolist():
            self._num_rejected += 1
            if shard[entry] < 0:
                yield next(without_picture)
                continue
            known = self._shard(int(shard[entry])).rejected
            why = known[int(row[entry])] if state[entry] == REJECTED else REMOVED_BY_HAND
            yield Rejected(
                stage=STAGE, key=block.keys[entry], reason=why.reason, detail=why.detail, attempts=why.attempts
            )

    def _add(self, index: IndexWriter, block: Block, columns: dict[str, Ints]) -> None:
        kept = np.flatnonzero(columns["state"] == KEPT)
        if not len(kept):
            return
        rows: dict[str, Any] = {name: columns[name][kept] for name in ("file", *_COLUMNS)}
        rows["row"] = columns["at"][kept]
        rows["key"] = [block.keys[entry] for entry in kept.tolist()]
        rows["tags"] = [block.entries[entry].tags for entry in kept.tolist()]
        rows["caption"] = [block.entries[entry].caption for entry in kept.tolist()]
        index.add(rows)
        width, height = rows["bucket_width_px"], rows["bucket_height_px"]
        error = np.abs(width / height - rows["original_width_px"] / rows["original_height_px"])
        self._ar_error_sum += float(error.sum())
        self._num_kept += len(kept)
        sizes, counts = np.unique(np.stack([width, height], axis=1), axis=0, return_counts=True)
        self._buckets.update({(w, h): count for (w, h), count in zip(sizes.tolist(), counts.tolist(), strict=True)})


class _NothingKept(Exception):
    """Ends the writers of meta_lat.json and the index so that they leave what was there."""
