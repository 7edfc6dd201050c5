"""From one layout to the other, shard by shard and commit group by commit group, continued where it was stopped."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import orjson

from sdxl_core.config import ConvertLatentsConfig
from sdxl_core.errors import ConfigError, ShardError
from sdxl_core.files import write_atomic
from sdxl_core.latents.convert.groups import GroupWriter, Item
from sdxl_core.latents.convert.reindex import Move, rewrite_index
from sdxl_core.latents.formats import LatentRecord, PackedFile, read_per_image
from sdxl_core.latents.formats.packed import PackedDtype
from sdxl_core.latents.index import LatentIndex
from sdxl_core.latents.ledger import KEPT, OPEN, REJECTED, REMOVED, LatentFile, ShardLedger
from sdxl_core.latents.rows import ENDING, LEDGER_FOLDER, ShardRows, write_rows
from sdxl_core.latents.settings import (
    CONFIG,
    fingerprint_of,
    latents_folder,
    read_settings,
    remember_config,
    settings_path,
    stored_config,
)
from sdxl_core.lock import output_lock
from sdxl_core.progress import Progress, no_progress
from sdxl_core.refs import LatentFilesRef

MAX_OPEN, NUM_THREADS = 128, 2
Ints = np.ndarray[Any, np.dtype[Any]]


def convert_latents(config: ConvertLatentsConfig, *, progress: Progress = no_progress) -> LatentFilesRef:
    """Write the set's latents in another layout below `out`, with ledgers, index and meta_lat.json.

    Lossless, but for float32 into packed float16; packed into per_image leaves the pictures' digests behind.
    Raises: ConfigError: the set itself as `out`; `out` holds another set.   ShardError: the set is not finished, or a
    file of it is damaged.   DataError: values too large for float16.   DiskFullError.
    """
    source, latents = latents_folder(config.path), config.out / "latents"
    if source.resolve() == latents.resolve():
        raise ConfigError(f"out = {config.out}: is the set that is converted. Name another folder.")
    index = LatentIndex.open(source)
    with output_lock(latents, purpose="convert-latents"):
        settings = _settings(config, read_settings(source))
        fingerprint = _remember(latents, settings)
        dtype: PackedDtype = settings.get("packed_dtype", "float32")
        moves: list[Move] = []
        taken: list[str] = []
        totals = np.zeros(3, np.int64)
        paths = sorted((source / LEDGER_FOLDER).glob(f"*{ENDING}"))
        for number, path in enumerate(paths):
            shard = _Shard(source, path, latents, fingerprint, taken)
            totals += shard.convert(config, dtype)
            moves.append(Move(path, shard.rows))
            taken.append(shard.digest)
            progress("convert", number + 1, len(paths))
        _copy_config(config, source, dtype)
        metadata = config.out / "meta_lat.json"
        beside = source.parent / "meta_lat.json"
        if beside.exists():
            write_atomic(metadata, _pieces(beside))
        rewrite_index(index, latents, moves, fingerprint=fingerprint, layout=config.layout, made_from="converted")
    num_rows, num_files, num_bytes = totals.tolist()
    return LatentFilesRef(
        what="convert-latents",
        path=latents,
        num_rows=num_rows,
        num_files=num_files,
        num_bytes=num_bytes,
        metadata=metadata if beside.exists() else None,
    )


def _settings(config: ConvertLatentsConfig, settings: dict[str, Any]) -> dict[str, Any]:
    """The settings that would have made the new set: those of the old one, with the layout's changed."""
    had = settings.get("packed_dtype", "float32") if settings["layout"] == "packed" else "float32"
    kept = {name: value for name, value in settings.items() if name not in ("layout", "packed_dtype", "npz_naming")}
    if config.layout == "per_image":
        return kept | {"layout": "per_image", "npz_naming": config.npz_naming}
    return kept | {"layout": "packed", "packed_dtype": had if config.packed_dtype == "source" else config.packed_dtype}


def _remember(latents: Path, settings: dict[str, Any]) -> str:
    """Write the settings where there are none. Returns their fingerprint. Raises: ConfigError: there are others."""
    path = settings_path(latents)
    if not path.exists():
        write_atomic(path, orjson.dumps(settings, option=orjson.OPT_INDENT_2))
    if fingerprint_of(read_settings(latents)) != fingerprint_of(settings):
        raise ConfigError(f"out = {latents.parent}: holds latents of other settings. Name another folder.")
    return fingerprint_of(settings)


def _copy_config(config: ConvertLatentsConfig, source: Path, dtype: PackedDtype) -> None:
    """What the set was made with, for cache-latents and `verify --repair` to continue the new one."""
    if (source / LEDGER_FOLDER / CONFIG).exists():
        values: dict[str, Any] = {"layout": config.layout, "npz_naming": config.npz_naming, "out": config.out}
        if config.layout == "packed":
            values["packed_dtype"] = dtype
        remember_config(stored_config(source).model_copy(update=values))


def _pieces(path: Path) -> Iterator[bytes]:
    with open(path, "rb") as file:
        while piece := file.read(1 << 20):
            yield piece


class _Shard:
    """One shard: the same rows in the new set, and what of them is to be converted.

    rows, digest: of the new one.
    """

    def __init__(self, source: Path, path: Path, latents: Path, fingerprint: str, taken: list[str]) -> None:
        self._source, self._latents = source, latents
        self._old = ShardRows.open(path)
        self._before = ShardLedger.read(path, self._old.num_rows)
        if not self._before.is_done:
            raise ShardError(
                f"{path}: this shard is not finished, or lost files. Run cache-latents (or verify --repair) on the set "
                f"first, then convert it."
            )
        table, size = self._old.table, self._old.commit_size
        self.digest, self.rows = write_rows(
            latents / LEDGER_FOLDER, table, roots=self._old.roots, commit_size=size, fingerprint=fingerprint,
            taken=taken,
        )  # fmt: skip
        self._after = ShardLedger.read(self.rows, self._old.num_rows)
        self._after.settle(latents)
        self._continues = bool(self._after.files)
        self._open = lru_cache(maxsize=MAX_OPEN)(PackedFile)

    def convert(self, config: ConvertLatentsConfig, dtype: PackedDtype) -> tuple[int, int, int]:
        """Returns: pictures, files and bytes of the finished shard."""
        writer = GroupWriter(self._latents, self.digest, config, dtype)
        size = self._old.commit_size
        with ThreadPoolExecutor(NUM_THREADS) as pool:
            for number in sorted({row // size for row in self._after.rows(OPEN).tolist()}):
                rows = np.arange(number * size, min((number + 1) * size, self._old.num_rows))
                rows = rows[self._after.columns["state"][rows] == OPEN]
                state = self._before.columns["state"][rows]
                items = list(pool.map(self._item, rows[state == KEPT].tolist()))
                rejected = {row: self._before.rejected[row] for row in rows[state == REJECTED].tolist()}
                self._after.commit(writer.write(number, items, rejected, taken=self._taken()))
                if (state == REMOVED).any():
                    self._after.remove(rows[state == REMOVED])
        if not self._after.is_done:
            self._after.close(dict(self._before.report or {}))
        files = self._used()
        return len(self._after.rows(KEPT)), len(files), sum(file.num_bytes for file in files)

    def _used(self) -> list[LatentFile]:
        """Files that hold committed rows."""
        numbers = np.unique(self._after.columns["file"][self._after.rows(KEPT)])
        return [self._after.files[number] for number in numbers.tolist()]

    def _taken(self) -> set[str]:
        """Their paths, where a run continues an earlier one: a group of it may have lost a file and kept another."""
        return {file.path for file in self._used()} if self._continues else set()

    def _item(self, row: int) -> Item:
        table = self._old.table
        return Item(row, table["key"][row].as_py(), table["name"][row].as_py(), self._record(row))

    def _record(self, row: int) -> LatentRecord:
        """Raises: ShardError: damaged, or an array that would not come back the same."""
        file = self._before.files[self._before.columns["file"][row]]
        at, checksum = int(self._before.columns["at"][row]), int(self._before.columns["crc32"][row])
        path = self._source / file.path
        if at < 0:
            return read_per_image(path, expected_crc32=checksum, exact=True)
        packed = self._open(path)
        if at >= packed.num_rows or packed.row_crc32s[at] != checksum:
            raise ShardError(
                f"{path}: row {at} is not what was committed. Run `sdxl-flows verify --repair` on the set."
            )
        return packed.row(at)
