"""Cut picked records into shards whose files are placed one shard at a time, by whoever comes by."""

from __future__ import annotations

import filecmp
import hashlib
import os
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import numpy as np
import orjson
import pyarrow as pa

from sdxl_core.catalog.records import Catalog
from sdxl_core.errors import ConfigError, DataError
from sdxl_core.files import atomic_writer, digest_of_all, disk_errors, remove_stale_partials, write_atomic
from sdxl_core.refs import ShardRef, SubsetPlanRef
from sdxl_core.rejected import Rejected, write_rejected
from sdxl_core.subset.known import KnownFiles, known_files
from sdxl_core.subset.ledger import HEAD_FILE, LEDGER_SUFFIX, Ledger, ledger_path, read_head, work_folder
from sdxl_core.subset.methods import try_link
from sdxl_core.subset.picks import wanted_groups
from sdxl_core.subset.placed import Placed, state_of

Ints = np.ndarray[Any, np.dtype[Any]]
FORMAT = 2
PICKED_FILE = "picked.arrow"
OTHERS_FILE = "others.jsonl"


@dataclass(frozen=True, slots=True)
class Picks:
    """What shall be placed in `out`: records of a catalog, in order. `settings`: what `out` belongs to, with `how`."""

    out: Path
    catalog: Catalog
    settings: dict[str, str]
    records: Ints

    @property
    def how(self) -> str:
        return self.settings["how"]

    @classmethod
    def open(cls, path: Path) -> Self:
        """As `write` left it, memory-mapped. Raises: DataError: it is gone, or the catalog is another by now."""
        try:
            reader = pa.ipc.open_file(pa.memory_map(str(path)))
            told = orjson.loads(reader.schema.metadata[b"picks"])
        except (OSError, pa.ArrowInvalid, orjson.JSONDecodeError, KeyError, TypeError) as error:
            raise DataError(f"{path}: what was picked is gone or damaged ({error}). Run the subset again.") from error
        catalog = Catalog.open(Path(told["catalog"]))
        if catalog.digest != told["catalog_digest"]:
            raise DataError(f"{catalog.path}: the catalog was changed while its subset was made. Run the subset again.")
        records = reader.get_batch(0)["record"].to_numpy()
        return cls(path.parent.parent, catalog, told["settings"], records)

    def write(self) -> Path:
        """8 bytes a record. What is there already is not written again."""
        path = work_folder(self.out) / PICKED_FILE
        told = {
            "catalog": str(self.catalog.path),
            "catalog_digest": self.catalog.digest,
            "settings": self.settings,
            "records": hashlib.sha256(self.records.data).hexdigest(),
        }
        metadata = {b"picks": orjson.dumps(told)}
        if not _says(path, metadata):
            batch = pa.record_batch([pa.array(self.records)], names=["record"])
            schema = batch.schema.with_metadata(metadata)
            with atomic_writer(path) as file, pa.ipc.new_file(file, schema) as writer:
                writer.write_batch(batch)
        return path

    def part(self, shard: ShardRef) -> Ints:
        return self.records[shard.start : shard.stop]


def plan_picks(picks: Picks, *, shard_size: int, others: Sequence[Rejected], num_refused: int) -> SubsetPlanRef:
    """Cut the picks into shards, and take over what earlier picks left in the folder.

    First everything is looked at, and refused if it cannot be done; then files of ours that nobody wants any more are
    removed, and what is known of the others goes to the ledgers of their new shards. A shard's digest covers the names,
    places, sizes and times of its files, and the settings.
    Args:   others: rows of the rejected list that are none of the picks, of which `num_refused` are no records either.
    Raises: ConfigError: `out` belongs to other settings; links are not possible.   DataError: a file of others is in
            the way, or one of ours that must leave was changed.
    """
    out = picks.out
    head = read_head(out, settings=picks.settings)
    path = work_folder(out) / PICKED_FILE
    shards = tuple(_shards(picks, path, shard_size))
    told = {"settings": picks.settings, "finished": False, "shards": [shard.digest for shard in shards]}
    is_something_there = _is_something_there(out)
    old = _old_ledgers(out, {shard.digest for shard in shards})
    remove_stale_partials(work_folder(out), name="*")
    with known_files(out, _ledgers(out, head, old)) as known:
        if is_something_there:
            _look(picks, shards, known)
        known.check_unwanted()
        remove_stale_partials(out, name="*", recursive=head is None or not head["finished"])
        if head is None or head.get("shards") != told["shards"]:
            write_atomic(out / HEAD_FILE, orjson.dumps(told))
        known.remove_unwanted()
    with disk_errors(out):
        for ledger_file in old:
            ledger_file.unlink(missing_ok=True)
    write_if_news(work_folder(out) / OTHERS_FILE, others)
    return SubsetPlanRef(
        path=picks.write(),
        digest=digest_of_all([FORMAT, *(shard.digest for shard in shards)]),
        shards=shards,
        num_refused=num_refused,
    )


def _shards(picks: Picks, path: Path, shard_size: int) -> Iterator[ShardRef]:
    tried: set[int] = set()
    for index, start in enumerate(range(0, len(picks.records), shard_size)):
        stop = min(start + shard_size, len(picks.records))
        digest = digest_of_all(_identity(picks, picks.records[start:stop], tried))
        yield ShardRef(index=index, start=start, stop=stop, digest=digest, path=path)


def _identity(picks: Picks, records: Ints, tried: set[int]) -> Iterator[str | bytes]:
    """What makes a shard another one. Args: tried: file systems that a link was tried from."""
    yield f"{FORMAT}"
    yield orjson.dumps(picks.settings, option=orjson.OPT_SORT_KEYS)
    for group in wanted_groups(picks.catalog, records):
        for wanted in group.files:
            size, time = state_of(wanted, picks.how)
            if picks.how != "copy" and wanted.text is None and size >= 0:
                device = os.stat(wanted.path).st_dev
                if device not in tried:
                    tried.add(device)
                    try_link(picks.how, wanted.path, picks.out)
            yield f"{wanted.name}|{wanted.path}|{wanted.offset}|{size}|{time}"
            if wanted.text is not None:
                yield wanted.text


def _is_something_there(out: Path) -> bool:
    with suppress(FileNotFoundError), os.scandir(out) as entries:
        return any(not entry.name.startswith(".lock") for entry in entries)
    return False


def _old_ledgers(out: Path, digests: set[str]) -> list[Path]:
    """The ledgers of shards that are no more."""
    kept = {ledger_path(out, digest) for digest in digests}
    return [path for path in sorted(work_folder(out).glob(f"*{LEDGER_SUFFIX}")) if path not in kept]


def _ledgers(out: Path, head: dict[str, Any] | None, paths: Iterable[Path]) -> Iterator[Ledger]:
    if head is not None and "files" in head:  # of a version that had one ledger
        yield Ledger.of(out / HEAD_FILE, head)
    yield from map(Ledger.read, paths)


def _look(picks: Picks, shards: Sequence[ShardRef], known: KnownFiles) -> None:
    """Look whether every shard can be placed; what is known of its files goes to its ledger.

    Raises: as `Placed.plan`. What ledgers have learned by then is true, whatever is picked next.
    """
    for shard in shards:
        ledger = Ledger.read(ledger_path(picks.out, shard.digest))
        is_heir = False
        if not known.is_empty:
            names = (file.name for group in wanted_groups(picks.catalog, picks.part(shard)) for file in group.files)
            is_heir = known.give(ledger, names)
        Placed(picks.out, picks.how, ledger).plan(wanted_groups(picks.catalog, picks.part(shard)))
        if is_heir:
            ledger.finished = False
            ledger.write()


def _says(path: Path, metadata: dict[bytes, bytes]) -> bool:
    try:
        return bool(pa.ipc.open_file(pa.memory_map(str(path))).schema.metadata == metadata)
    except (OSError, pa.ArrowInvalid):
        return False


def write_if_news(path: Path, rows: Iterable[Rejected]) -> int:
    """Write a list of rejections as it comes; one that is there already keeps its file. Returns the number of rows."""
    news = path.with_name(f".{path.name}.new")
    num_rows = write_rejected(news, rows)
    if path.exists() and filecmp.cmp(news, path, shallow=False):
        news.unlink()
    else:
        os.replace(news, path)
    return num_rows


def refuse_without_pictures(catalog: Catalog, how: str) -> None:
    """Raises: ConfigError: there is nothing to place."""
    if not catalog.knows_pictures:
        raise ConfigError(
            f"how = {how}: no source of {catalog.path} has pictures, so none can be placed. Use --how manifest, or "
            f"build the catalog with the folder or the tars of the pictures among its sources."
        )
