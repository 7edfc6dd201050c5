"""Which pictures a metadata JSON wants, which of them shards hold already, and new shards for the others.

Shards are never cut again: pictures that were added, removed or replaced cost themselves and nothing else. A plan is
kept and believed as long as what it was made from is the same, so that a finished set of millions resumes in seconds.
About 300 bytes a picture are held while a plan is made (benchmarks/latent_resume.md).
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from pydantic.dataclasses import dataclass

from sdxl_core.config import CacheLatentsConfig
from sdxl_core.errors import DataError, ShardError
from sdxl_core.files import digest_of, sha256_file
from sdxl_core.latents.ledger import KEPT, OPEN, REMOVED, ShardLedger, read_summary
from sdxl_core.latents.matching import HashTable, hashes_of
from sdxl_core.latents.metadata import blocks
from sdxl_core.latents.pictures import Ints, Pictures, PictureSource
from sdxl_core.latents.rows import ENDING, FORMAT, LEDGER_FOLDER, ROWS, ShardRows, identities, write_rows
from sdxl_core.latents.settings import check_settings
from sdxl_core.latents.tables import read_table, read_words, write_table
from sdxl_core.refs import ShardRef
from sdxl_core.rejected import Rejected, write_rejected

PLAN = "plan.arrow"
PLAN_REJECTED = "plan.rejected.jsonl"
STAGE = "latents"
_ROWS_AT_ONCE = 65_536


@dataclass(frozen=True, slots=True, kw_only=True)
class LatentPlan:
    """A latent set to be made. `path`: for each entry of the metadata, shard and row in it, -1 for a rejected one.

    fingerprint: identity of the settings.   digest: identity of all that it was made from.
    num_seen: entries of the metadata.   num_rejected: of them without a picture of their own; `rejected` lists them.
    metadata_sha256: of the metadata.   metadata_is: its size and time.
    """

    shards: tuple[ShardRef, ...]
    fingerprint: str
    digest: str
    num_seen: int
    num_rejected: int
    metadata_sha256: str
    metadata_is: tuple[int, int]
    path: Path
    rejected: Path

    def check_metadata(self, metadata: Path) -> None:
        """Entries are told apart by their place, so this plan is good for this very file only.

        Raises: DataError: the file has changed since.
        """
        if _look_at(metadata) != self.metadata_is and sha256_file(metadata) != self.metadata_sha256:
            raise _changed(metadata)

    def places(self) -> pa.RecordBatch:
        """int32 shard (position in `shards`, or -1) and row of every entry. Raises: ShardError: damaged."""
        try:
            return read_table(self.path)
        except ShardError as error:
            self.path.unlink(missing_ok=True)
            raise ShardError(f"{self.path}: the plan is damaged. Run cache-latents again; it is made anew.") from error


def plan_latents(config: CacheLatentsConfig) -> LatentPlan:
    """Resolve every key to a picture, check the settings against what `out` holds, and cut what is new into shards.

    Writes the rows of new shards to `out/latents/.ledger/`. No picture is opened.
    Raises: ConfigError: missing source, VAE or metadata; `out` belongs to other settings.   DataError.
    """
    source = PictureSource(config)
    source_digest = source.digest
    metadata_is = _look_at(config.metadata)
    fingerprint = check_settings(config)  # remembered from here on: not before the rest is known to be there
    root_map = [part for pair in sorted(config.root_map.items()) for part in pair]
    digest = digest_of(FORMAT, fingerprint, source_digest, *metadata_is, str(config.metadata.absolute()), *root_map)
    folder = config.out / "latents" / LEDGER_FOLDER
    return last_plan(folder, digest=digest) or _new_plan(config, source, fingerprint, digest, metadata_is)


def _look_at(metadata: Path) -> tuple[int, int]:
    """Its size and time. A file that is not there is told by the one who reads it."""
    try:
        status = os.stat(metadata)
    except OSError:
        next(blocks(metadata))
        raise
    return status.st_size, status.st_mtime_ns


def _changed(metadata: Path) -> DataError:
    return DataError(
        f"{metadata}: was changed since this run began. Run the same command again; it encodes only what is new."
    )


def last_plan(folder: Path, *, digest: str | None = None) -> LatentPlan | None:
    """The plan of the last run, if it was made from the same (`digest`) and the shards it names are there.

    Args:   folder: of the ledgers.
    """
    try:
        told = read_words(folder / PLAN)
        if digest is not None and told["digest"] != digest:
            return None
        names = told.pop("shards")
        sizes = [ShardRows.open(folder / f"{name[:32]}{ENDING}").num_rows for name in names]
        if sha256_file(folder / PLAN_REJECTED) != told.pop("rejected_sha256"):
            return None
    except (ShardError, FileNotFoundError, KeyError, TypeError):
        return None
    return LatentPlan(shards=_references(folder, names, sizes), **_paths(folder), **told)


def _references(folder: Path, digests: Sequence[str], sizes: Sequence[int]) -> tuple[ShardRef, ...]:
    stops = np.cumsum(sizes, dtype=np.int64).tolist()
    return tuple(
        ShardRef(index=number, start=stop - size, stop=stop, digest=name, path=folder / f"{name[:32]}{ENDING}")
        for number, (name, size, stop) in enumerate(zip(digests, sizes, stops, strict=True))
    )


def _paths(folder: Path) -> dict[str, Any]:
    return {"path": folder / PLAN, "rejected": folder / PLAN_REJECTED}


def _new_plan(
    config: CacheLatentsConfig, source: PictureSource, fingerprint: str, digest: str, metadata_is: tuple[int, int]
) -> LatentPlan:
    folder = config.out / "latents" / LEDGER_FOLDER
    pictures = source.pictures()
    wanted = _Wanted.read(config, source, pictures, folder / PLAN_REJECTED)
    held = _Held.read(folder)
    shard, row = held.find(wanted.identity)
    new = np.flatnonzero(shard < 0)
    names = held.digests + held.cut(new, wanted, config, fingerprint, shard, row)
    held.supersede(hashes_of(pictures.places["name"].take(pa.array(wanted.position[new]))), wanted.identity)
    used, first, numbered = np.unique(shard, return_index=True, return_inverse=True)
    order = np.argsort(first)  # shards in the order in which the metadata meets them
    rank = np.empty(len(used), np.int64)
    rank[order] = np.arange(len(used))
    digests = [names[number] for number in used[order].tolist()]
    sizes = [ShardRows.open(folder / f"{name[:32]}{ENDING}").num_rows for name in digests]
    places = np.full((2, wanted.num_seen), -1, np.int32)
    places[:, wanted.entry] = rank[numbered], row
    told: dict[str, Any] = {
        "digest": digest,
        "fingerprint": fingerprint,
        "num_seen": wanted.num_seen,
        "num_rejected": wanted.num_seen - len(wanted.entry),
        "metadata_sha256": sha256_file(config.metadata),
        "metadata_is": metadata_is,
    }
    if _look_at(config.metadata) != metadata_is:
        raise _changed(config.metadata)
    table = pa.RecordBatch.from_arrays([pa.array(places[0]), pa.array(places[1])], names=["shard", "row"])
    write_table(
        folder / PLAN, table, told | {"shards": digests, "rejected_sha256": sha256_file(folder / PLAN_REJECTED)}
    )
    return LatentPlan(shards=_references(folder, digests, sizes), **_paths(folder), **told)


class _Wanted:
    """Entries of the metadata that have a picture: `entry` (number in the metadata), its `position` among the pictures
    and its `identity`; `keys` of all entries."""

    def __init__(self, pictures: Pictures, keys: pa.LargeStringArray, entry: Ints, position: Ints, num_seen: int):
        self.pictures, self.keys, self.entry, self.position, self.num_seen = pictures, keys, entry, position, num_seen
        pieces = (position[start : start + _ROWS_AT_ONCE] for start in range(0, len(position), _ROWS_AT_ONCE))
        found = [identities(pictures.places.take(pa.array(piece))) for piece in pieces]
        self.identity = np.concatenate([*found, np.zeros(0, np.uint64)])

    @classmethod
    def read(cls, config: CacheLatentsConfig, source: PictureSource, pictures: Pictures, rejected: Path) -> _Wanted:
        found: list[Ints] = []
        keys: list[pa.Array] = []
        prefixes = _prefixes(source)
        for block in blocks(config.metadata):
            found.append(pictures.find([name_below_source(key, config, prefixes) for key in block.keys]))
            keys.append(pa.array(block.keys, pa.large_string()))
        position, texts = np.concatenate(found), pa.concat_arrays(keys)
        there = np.flatnonzero(position >= 0)
        owner = pictures.owners(position[there])
        _, first, which = np.unique(owner, return_index=True, return_inverse=True)
        is_first = np.zeros(len(there), bool)
        is_first[first] = True
        write_rejected(rejected, _left_out(config, pictures, texts, position, there, first[which]))
        entry = there[is_first]
        return cls(pictures, texts, entry, position[entry], len(texts))

    def rows(self, some: Ints) -> pa.RecordBatch:
        """`ROWS` of wanted pictures by number."""
        places = self.pictures.places.take(pa.array(self.position[some]))
        keys = self.keys.take(pa.array(self.entry[some]))
        return pa.RecordBatch.from_arrays([keys, *places.columns, pa.array(self.identity[some])], schema=ROWS)


def _left_out(
    config: CacheLatentsConfig, pictures: Pictures, keys: pa.Array, position: Ints, there: Ints, first: Ints
) -> Iterator[Rejected]:
    """Why entries have no picture of their own, in their order. Args: first: of `there`, where its picture's owner is
    in `there`."""
    owner = np.full(len(keys), -1, np.int64)
    owner[there] = there[first]
    for number in np.flatnonzero(owner != np.arange(len(keys))).tolist():
        key = keys[number].as_py()
        if owner[number] < 0:
            yield Rejected(stage=STAGE, key=key, reason="missing_image", detail=f"no picture for it in {config.source}")
        else:
            image, as_key = pictures.places["image"][position[number]].as_py(), keys[owner[number]].as_py()
            yield Rejected(stage=STAGE, key=key, reason="duplicate_key", detail=f"{image} is already there as {as_key}")


class _Held:
    """The rows that shards hold, by identity and by name: those that were not removed. `digests`: of the shards."""

    def __init__(self, folder: Path, shards: list[ShardRows], digests: list[str], states: list[Ints]) -> None:
        self._folder, self._shards, self.digests = folder, shards, digests
        sizes = [len(state) for state in states]
        state = np.concatenate([*states, np.zeros(0, np.uint8)])
        there = np.flatnonzero(state != REMOVED)
        self._state = state[there]
        self._shard = np.repeat(np.arange(len(sizes), dtype=np.int32), sizes)[there]
        starts = np.repeat(np.cumsum([0, *sizes[:-1]]) if sizes else np.zeros(0, np.int64), sizes)
        self._row = (np.arange(len(state)) - starts).astype(np.int32)[there]
        hashes = [shard.table["identity"].to_numpy() for shard in shards]
        self._by_identity = HashTable(np.concatenate([*hashes, np.zeros(0, np.uint64)])[there])
        self._there = there

    @classmethod
    def read(cls, folder: Path) -> _Held:
        """Shards with a damaged listing are not there; their pictures will be cut anew, to the same shard."""
        shards, digests, states = list[ShardRows](), list[str](), list[Ints]()
        for path in sorted(folder.glob(f"*{ENDING}")):
            try:
                rows = ShardRows.open(path)
                assert rows.table.num_rows == rows.num_rows
                digest = read_words(path)["digest"]
            except ShardError:
                path.unlink(missing_ok=True)
                continue
            shards.append(rows)
            digests.append(digest)
            states.append(_states(path, rows.num_rows))
        return cls(folder, shards, digests, states)

    def find(self, identity: Ints) -> tuple[Ints, Ints]:
        """Shard and row of each identity, -1 where no shard holds it."""
        at = self._by_identity.find(identity)
        return (
            np.where(at >= 0, self._shard[at] if len(self._shard) else -1, -1).astype(np.int32),
            np.where(at >= 0, self._row[at] if len(self._row) else -1, -1).astype(np.int32),
        )

    def cut(
        self, new: Ints, wanted: _Wanted, config: CacheLatentsConfig, fingerprint: str, shard: Ints, row: Ints
    ) -> list[str]:
        """Cut wanted pictures that no shard holds into new shards; enters them in `shard` and `row`. Their digests."""
        digests: list[str] = []
        for start in range(0, len(new), config.shard_size):
            some = new[start : start + config.shard_size]
            digest, _ = write_rows(
                self._folder,
                wanted.rows(some),
                roots=wanted.pictures.roots,
                commit_size=config.commit_size,
                fingerprint=fingerprint,
                taken=self.digests,
            )
            shard[some], row[some] = len(self.digests) + len(digests), np.arange(len(some))
            digests.append(digest)
        return digests

    def supersede(self, names: Ints, wanted: Ints) -> None:
        """Take out rows of pictures that were replaced: new rows stand for them now, or two would own one file.

        Args:   names: hashes of the names of rows that were cut just now.   wanted: identities; a name that is there
                twice was cut by a run that was killed here, and the row that is wanted stays.
        """
        if not len(self._shards):
            return
        hashes = np.concatenate([hashes_of(shard.table["name"]) for shard in self._shards])[self._there]
        counts = np.isin(self._state, (OPEN, KEPT))
        replaced = counts & np.isin(hashes, names)
        ordered = np.sort(hashes[counts])
        twice = counts & np.isin(hashes, ordered[1:][ordered[1:] == ordered[:-1]])
        if twice.any():
            at = self._by_identity.find(wanted)
            twice[at[at >= 0]] = False
        replaced |= twice
        if not replaced.any():
            return
        numbers, starts = np.unique(self._shard[replaced], return_index=True)  # ascending, as the shards stand there
        for number, mine in zip(numbers.tolist(), np.split(self._row[replaced], starts[1:]), strict=True):
            ShardLedger.read(self._shards[number].path, self._shards[number].num_rows).remove(mine)


def _states(path: Path, num_rows: int) -> Ints:
    summary = read_summary(path)
    if summary is not None:
        try:
            states: Ints = summary.table()["state"].to_numpy()
            return states
        except ShardError:
            pass
    return ShardLedger.read(path, num_rows).columns["state"]


def _prefixes(source: PictureSource) -> list[str]:
    """What keys that are whole paths may begin with."""
    paths = [text for root in source.roots() for text in (str(root), os.path.abspath(root))]
    return list(dict.fromkeys(path.rstrip("/") + "/" for path in paths))


def name_below_source(key: str, config: CacheLatentsConfig, prefixes: Sequence[str]) -> str:
    """A key as a POSIX path below the source: root mapping applied, the source's own path taken off."""
    name = key.replace("\\", "/") if config.root_map else key
    for old, new in config.root_map.items():
        if name.startswith(old.replace("\\", "/")):
            name = new + name[len(old) :]
            break
    for prefix in prefixes:
        if name.startswith(prefix):
            return name[len(prefix) :]
    return name
