"""Reading every byte of a latent set: CRC, shape, finite values, settings; and encoding again exactly what is bad."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import orjson
import pyarrow as pa

from sdxl_core.config import CacheLatentsConfig, VerifyLatentsConfig
from sdxl_core.errors import DataError, DiskFullError, ShardError
from sdxl_core.files import sha256_file, write_atomic
from sdxl_core.latents.ahead import worked_ahead
from sdxl_core.latents.cache import cache_latents
from sdxl_core.latents.formats import PackedFile, packed, per_image, read_per_image
from sdxl_core.latents.formats.record import is_finite
from sdxl_core.latents.index import INDEX_END, LatentIndex
from sdxl_core.latents.join import SET
from sdxl_core.latents.ledger import KEPT, SUMMARY, LatentFile, ShardLedger, read_summary
from sdxl_core.latents.matching import marks_of
from sdxl_core.latents.plan import PLAN
from sdxl_core.latents.rows import ENDING, LEDGER_FOLDER, ShardRows, shard_file
from sdxl_core.latents.settings import fingerprint_of, latents_folder, read_settings, stored_config
from sdxl_core.latents.tables import parse_checked, read_table, read_words
from sdxl_core.lock import output_lock
from sdxl_core.progress import Progress, no_progress
from sdxl_core.refs import VerifiedRef
from sdxl_core.summary import counted

FINDINGS, MOST_TOLD = "verify.jsonl", 5
Ints = np.ndarray[Any, np.dtype[Any]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Finding:
    """Something bad. `keys`: pictures whose latents are, none where it is a list of ours that is made again."""

    file: str
    problem: str
    keys: tuple[str, ...] = ()


def verify_latents(config: VerifyLatentsConfig, *, progress: Progress = no_progress) -> VerifiedRef:
    """Read everything. With `repair`, bad rows are taken out of their ledgers and encoded again, and lists made anew.

    Without it nothing is changed but the list of findings, so it may run beside a cache that is being made, and over a
    set that cannot be written to.
    Raises: ShardError: something is bad and was not to be repaired, or could not be.   DataError: no latent set.
    """
    started = time.monotonic()
    latents = latents_folder(config.path)
    with output_lock(latents, purpose="verify --repair") if config.repair else nullcontext():
        check = _Check(latents, config, progress)
        findings = check.run()
        path = _listed(latents, findings)
        num_bad = sum(len(finding.keys) for finding in findings)
        if findings and not config.repair:
            raise ShardError(_told(latents, findings, path))
        if findings:
            made_with = stored_config(latents)
            _check_sources(made_with)  # before anything is taken out
            check.take_out()
            cache_latents(made_with, progress=progress)
            left = _Check(latents, config, no_progress).run()
            if left:
                raise ShardError(f"After the repair:\n{_told(latents, left, path)}")
    return VerifiedRef(
        path=latents,
        fingerprint=fingerprint_of(read_settings(latents)),
        num_files=check.num_files,
        num_bytes=check.num_bytes,
        num_rows=check.num_rows,
        num_repaired=num_bad,
        findings=path,
        seconds=round(time.monotonic() - started, 3),
    )


def _check_sources(config: CacheLatentsConfig) -> None:
    """Raises: DataError: what is bad could not be encoded again from here."""
    for path in filter(None, (config.source, config.metadata, config.manifest)):
        if not path.exists():
            raise DataError(
                f"{path}: is not there, and what is bad must be encoded from it again; nothing was taken out. Put it "
                f"back, or where this is a relative path, start from the folder in which cache-latents was started."
            )


def _listed(latents: Path, findings: Sequence[Finding]) -> Path | None:
    """Where the list of all findings is now; None where the set cannot be written to."""
    path = latents / LEDGER_FOLDER / FINDINGS
    try:
        write_atomic(path, (orjson.dumps(asdict(f), option=orjson.OPT_APPEND_NEWLINE) for f in findings))
    except (DataError, DiskFullError):
        return None
    return path


def _told(latents: Path, findings: Sequence[Finding], path: Path | None) -> str:
    """A paragraph about them; all of them where they are listed nowhere."""
    num_told = len(findings) if path is None else MOST_TOLD
    lines = [f"  {finding.file}: {finding.problem}" for finding in findings[:num_told]]
    more = [f"  and {len(findings) - num_told} more, all in {path}"] if len(findings) > num_told else []
    head = f"{latents}: {counted(len(findings), 'file')} not as written"
    advice = f"`sdxl-flows verify {latents} --repair` makes anew exactly what is bad."
    if num_bad := sum(len(finding.keys) for finding in findings):
        head += f", and with that the latents of {counted(num_bad, 'picture')}"
        advice = f"`sdxl-flows verify {latents} --repair` encodes exactly these pictures again."
    if "made_by" in read_settings(latents):
        advice = "Put whole files in their place, and run import-latents again: it takes what is whole."
    return "\n".join([f"{head}:", *lines, *more, f"Nothing of it is served to training. {advice}"])


class _Check:
    """One reading of a set. num_files, num_bytes, num_rows: what was read and is good."""

    def __init__(self, latents: Path, config: VerifyLatentsConfig, progress: Progress) -> None:
        self._latents, self._progress = latents, progress
        self._num_threads = config.threads or 2 * (os.cpu_count() or 1)
        self.num_files = self.num_bytes = self.num_rows = 0
        self._lost: dict[Path, list[int]] = {}
        self._damaged_lists: list[Path] = []
        self._marks = [np.zeros(0, np.uint64)]  # of what the ledgers hold
        settings = read_settings(latents)
        self._fingerprint = fingerprint_of(settings)
        dtype = settings.get("packed_dtype", "float32")
        self._dtype = np.dtype(dtype if settings.get("layout") == "packed" else "float32")

    def run(self) -> list[Finding]:
        findings = [*self._lists(), *self._missing_listings()]
        paths = sorted((self._latents / LEDGER_FOLDER).glob(f"*{ENDING}"))
        with ThreadPoolExecutor(self._num_threads) as pool:
            for number, path in enumerate(paths):
                findings += self._shard(path, pool)
                self._progress("verify", number + 1, len(paths), f"{self.num_bytes / 1e9:.1f} GB")
        return [*findings, *self._unknown()]

    def take_out(self) -> None:
        """Bad rows are open again; damaged lists go, and are made anew by the next join."""
        for path, rows in self._lost.items():
            ledger = ShardLedger.read(path, ShardRows.open(path).num_rows)
            ledger.settle(self._latents)
            files = {ledger.files[number].path for number in np.unique(ledger.columns["file"][rows]).tolist()}
            ledger.lose(rows)
            kept = np.unique(ledger.columns["file"][ledger.rows(KEPT)]).tolist()
            for name in files - {ledger.files[number].path for number in kept}:
                (self._latents / name).unlink(missing_ok=True)
        for path in self._damaged_lists:
            path.unlink(missing_ok=True)

    def _lists(self) -> Iterator[Finding]:
        """The index and meta_lat.json against what was written."""
        folder, has_index = self._latents / LEDGER_FOLDER, LatentIndex.exists(self._latents)
        if (folder / SET).exists():
            joined = parse_checked((folder / SET).read_bytes())
            if joined is None:
                self._damaged_lists.append(folder / SET)
                yield Finding(file=f"{LEDGER_FOLDER}/{SET}", problem="damaged")
            elif joined["num_kept"]:
                has_index = True
                metadata = self._latents.parent / "meta_lat.json"
                if not metadata.is_file() or sha256_file(metadata) != joined["metadata_sha256"]:
                    self._damaged_lists.append(folder / SET)
                    yield Finding(file="../meta_lat.json", problem="is not what cache-latents wrote")
        problems = self._index_problems() if has_index else []
        if problems:
            self._damaged_lists.append(self._latents / INDEX_END)
        for problem in problems:
            yield Finding(file="index.arrow", problem=problem)

    def _index_problems(self) -> list[str]:
        try:
            index = LatentIndex.open(self._latents)
        except DataError as error:
            return [str(error)]
        other = [] if index.fingerprint == self._fingerprint else ["the index is of latents of other settings"]
        return [*index.verify(), *other]

    def _unknown(self) -> Iterator[Finding]:
        """What the index names and no ledger holds: nobody would look at it."""
        held = np.concatenate(self._marks)
        unknown = 0
        with suppress(DataError):  # damaged, or none: see `_lists`
            for batch in LatentIndex.open(self._latents).chunks(["key", "crc32"]):
                unknown += int((~np.isin(marks_of(batch["key"], batch["crc32"].to_numpy()), held)).sum())
        if unknown:
            self._damaged_lists.append(self._latents / INDEX_END)
            problem = f"names {unknown} pictures whose latents no ledger holds; what is not there is encoded again"
            yield Finding(file="index.arrow", problem=problem)

    def _missing_listings(self) -> Iterator[Finding]:
        folder = self._latents / LEDGER_FOLDER
        try:
            shards = read_words(folder / PLAN)["shards"] if (folder / PLAN).exists() else []
            if shards:
                read_table(folder / PLAN)
        except ShardError:
            self._damaged_lists.append(folder / PLAN)
            yield Finding(file=f"{LEDGER_FOLDER}/{PLAN}", problem="damaged")
            return
        for digest in shards:
            if not (folder / f"{digest[:32]}{ENDING}").exists():
                yield Finding(file=f"{LEDGER_FOLDER}/{digest[:32]}{ENDING}", problem="the listing of a shard is gone")

    def _shard(self, path: Path, pool: ThreadPoolExecutor) -> Iterator[Finding]:
        name = path.relative_to(self._latents).as_posix()
        try:
            rows = ShardRows.open(path)
            keys = rows.table["key"]
        except ShardError:
            self._damaged_lists.append(path)
            yield Finding(file=name, problem="the listing of this shard is damaged; its pictures are encoded again")
            return
        ledger = ShardLedger.read(path, rows.num_rows)
        if ledger.is_damaged:
            self._lost.setdefault(path, [])
            yield Finding(
                file=ledger.path.name, problem="lines of this ledger are damaged; their groups are done again"
            )
        yield from self._summary(path, ledger)
        kept = ledger.rows(KEPT)
        self._marks.append(marks_of(keys.take(pa.array(kept)), ledger.columns["crc32"][kept]))
        order = kept[np.argsort(ledger.columns["file"][kept], kind="stable")]
        numbers, starts = np.unique(ledger.columns["file"][order], return_index=True)
        jobs = zip(numbers.tolist(), np.split(order, starts[1:]) if len(order) else [], strict=True)
        ahead = 4 * self._num_threads
        for file, mine, problem, bad in worked_ahead(pool, lambda job: self._file(ledger, *job), jobs, ahead=ahead):
            self.num_files += 1
            self.num_bytes += file.num_bytes
            self.num_rows += len(mine) - len(bad)
            if problem:
                self._lost.setdefault(path, []).extend(bad)
                yield Finding(file=file.path, problem=problem, keys=tuple(keys.take(pa.array(bad)).to_pylist()))

    def _summary(self, path: Path, ledger: ShardLedger) -> Iterator[Finding]:
        """A summary that goes with its ledger says the same."""
        file = shard_file(path, SUMMARY)
        if not file.exists():
            return
        try:
            read_words(file)
            summary = read_summary(path)
            if summary is None:  # of an earlier state of the ledger; not believed
                return
            table = summary.table()
            names = ("state", "file", "at", "crc32")
            if all(np.array_equal(table[name].to_numpy(), ledger.columns[name]) for name in names):
                return
        except ShardError:
            pass
        self._damaged_lists.append(file)
        yield Finding(file=f"{LEDGER_FOLDER}/{file.name}", problem="is damaged, or differs from its ledger")

    def _file(self, ledger: ShardLedger, number: int, rows: Ints) -> tuple[LatentFile, list[int], str, list[int]]:
        """What a file's rows are, what is wrong with it ("" for nothing), and the bad ones of its rows."""
        file, mine = ledger.files[number], rows.tolist()
        try:
            if ledger.columns["at"][mine[0]] >= 0:
                problem, bad = self._packed(file, ledger, mine)
            else:
                problem, bad = self._per_image(file, ledger, mine[0]), mine
        except ShardError as error:
            problem, bad = str(error).removeprefix(f"{self._latents / file.path}: "), mine
            for advice in (packed.REPAIR, per_image.REPAIR, per_image.MISSING):  # what to do is said once, at the end
                problem = problem.removesuffix(f" {advice}")
        return file, mine, problem, bad if problem else []

    def _per_image(self, file: LatentFile, ledger: ShardLedger, row: int) -> str:
        record = read_per_image(self._latents / file.path, expected_crc32=file.crc32)
        if record.bucket != tuple(ledger.columns["bucket"][row].tolist()):
            return f"holds latents of bucket {record.bucket}, not {ledger.columns['bucket'][row].tolist()}"
        return "" if all(is_finite(array) for _, array in record.arrays()) else "holds values that are not finite"

    def _packed(self, file: LatentFile, ledger: ShardLedger, rows: list[int]) -> tuple[str, list[int]]:
        packed = PackedFile(self._latents / file.path)
        checked = packed.verify()
        at = ledger.columns["at"][rows]
        if packed.dtype != self._dtype or packed.bucket != tuple(ledger.columns["bucket"][rows[0]].tolist()):
            return f"holds {packed.dtype} latents of bucket {packed.bucket}", rows
        if at.max() >= packed.num_rows:
            return f"holds {packed.num_rows} rows, and row {at.max()} was committed: it is another file", rows
        damaged = np.isin(at, [*checked.damaged_rows, *checked.infinite_rows])
        damaged |= packed.row_crc32s[at] != ledger.columns["crc32"][rows]
        if damaged.any():
            return f"{int(damaged.sum())} of its rows are damaged", np.array(rows)[damaged].tolist()
        is_as_written = checked.crc32 == file.crc32 and not checked.is_damaged
        if is_as_written or np.setdiff1d(checked.damaged_rows, at).size:  # of a row that was replaced
            return "", []
        return "is damaged beside its rows", rows
