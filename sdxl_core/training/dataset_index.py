"""Where the rows of a training set are: the latent cache's own index, or one made for this run.

A cache that cache-latents made has an index beside its latents, and its rows are those of its meta_lat.json. Latents of
sd-scripts have none, and a meta_lat.json that was edited or joined from several says something else than the index;
then the run keeps an index of its own in `OUT/state/dataset/`, made from the JSON once, in constant memory.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import orjson

from sdxl_core.catalog.jsonsplit import layout_of, ranges
from sdxl_core.config import TrainConfig
from sdxl_core.dataset.metadata import check_entries, read_metadata
from sdxl_core.errors import ConfigError, DataError
from sdxl_core.files import digest_of, sha256_file
from sdxl_core.latents import LatentStore
from sdxl_core.latents.index import INDEX_END, ROWS, IndexWriter, LatentIndex

NAMED = 3  # how many samples an error message names
SMALL_BYTES = 64 << 20  # read at once, hashed without a thought
_RANGE_BYTES = 8 << 20


def open_dataset(config: TrainConfig) -> LatentIndex:
    """The index of what `metadata` names, every row of which has latents below `latents`.

    Raises: ConfigError: no such file or folder.   DataError: not our JSON; entries without `train_resolution`; latents
            missing (the first few are named).
    """
    if not config.metadata.is_file():
        raise ConfigError(
            f"metadata = {config.metadata}: there is no such file. Run cache-latents first; it writes it."
        )
    if not config.latents.is_dir():
        raise ConfigError(f"latents = {config.latents}: there is no such folder. Run cache-latents first.")
    if LatentIndex.exists(config.latents):
        index = LatentIndex.open(config.latents)
        if index.num_rows and _is_of(index, config):
            return index
    return _own_index(config)


def _is_of(index: LatentIndex, config: TrainConfig) -> bool:
    """Whether an index was made with this metadata JSON: by its digest; a large one that lies where cache-latents put

    it is believed if it was not written after the index.
    """
    status = config.metadata.stat()
    beside = config.metadata.resolve() == (config.latents.parent / "meta_lat.json").resolve()
    untouched = status.st_mtime_ns <= (config.latents / INDEX_END).stat().st_mtime_ns
    if status.st_size > SMALL_BYTES and beside and untouched:
        return True
    return sha256_file(config.metadata) == index.metadata_sha256


def _own_index(config: TrainConfig) -> LatentIndex:
    folder = config.out / "state" / "dataset"
    status = config.metadata.stat()
    made_from = digest_of(str(config.metadata), status.st_size, status.st_mtime_ns, str(config.latents))
    with suppress(DataError):  # none yet, or a damaged one: it is made again
        index = LatentIndex.open(folder)
        if index.made_from == made_from:
            return index
    folder.mkdir(parents=True, exist_ok=True)
    store = LatentStore(config.latents)
    missing: list[str] = []
    num_missing = num_rows = 0
    with IndexWriter(folder, fingerprint="", made_from=made_from) as writer:
        for entries in stream_metadata(config.metadata):
            keys = [key for key in entries if not store.has(key)]
            num_missing, missing = num_missing + len(keys), [*missing, *keys][:NAMED]
            writer.add(_columns(config.metadata, entries))
            num_rows += len(entries)
        if num_missing:
            raise DataError(
                f"{config.latents}: holds no latents of {_named(missing, num_missing)} that {config.metadata} names. "
                f"Run cache-latents again; finished pictures are not redone."
            )
        if not num_rows:
            raise DataError(f"{config.metadata}: holds no picture, so there is nothing to train on. Run cache-latents.")
        writer.finish(metadata_sha256=sha256_file(config.metadata))
    return LatentIndex.open(folder)


def stream_metadata(path: Path) -> Iterator[dict[str, dict[str, Any]]]:
    """The checked entries of a metadata JSON, a part of the file at a time; a small file at once.

    Raises: as `read_metadata`.
    """
    if path.stat().st_size <= SMALL_BYTES:
        yield read_metadata(path)
        return
    with open(path, "rb") as file:
        layout = layout_of(file, str(path))
        end = path.stat().st_size
        for begin, stop in ranges(file, layout, range_bytes=_RANGE_BYTES):
            file.seek(begin)
            text = file.read(stop - begin).strip()
            if stop == end:  # the brace that closes the object; without it the file was cut behind an entry
                text = text[:-1] if text.endswith(b"}") else b"cut short"
            try:
                entries = orjson.loads(b"{" + text.strip().removesuffix(b",") + b"}")
            except orjson.JSONDecodeError as error:
                raise DataError(
                    f"{path}: not valid JSON between bytes {begin} and {stop} ({error}). Make it again with "
                    f"`sdxl-flows cache-latents`."
                ) from error
            check_entries(path, entries)
            yield entries


def _columns(metadata: Path, entries: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """As `IndexWriter.add` takes them; where latents are is the store's to know."""
    sizes = [_bucket(metadata, key, entry) for key, entry in entries.items()]
    nothing = {
        field.name: np.zeros(len(entries), field.type.to_pandas_dtype())
        for field in ROWS
        if not field.nullable and field.name not in ("key", "key_hash")
    }
    return nothing | {
        "key": list(entries),
        "tags": [entry.get("tags") for entry in entries.values()],
        "caption": [entry.get("caption") for entry in entries.values()],
        "bucket_width_px": np.array([size[0] for size in sizes], np.int32),
        "bucket_height_px": np.array([size[1] for size in sizes], np.int32),
    }


def _bucket(metadata: Path, key: str, entry: dict[str, Any]) -> tuple[int, int]:
    bucket = entry.get("train_resolution")
    if bucket is None:
        raise DataError(
            f"{metadata}: {key!r} has no train_resolution, so it has no latents. Is this meta_cap_dd.json? Training "
            f"reads the meta_lat.json that cache-latents writes."
        )
    width_px, height_px = bucket
    if width_px % 8 or height_px % 8:
        raise DataError(f"{metadata}: {key!r} has train_resolution {bucket}; sides must be multiples of 8 px.")
    return width_px, height_px


def _named(keys: list[str], count: int) -> str:
    names = ", ".join(repr(key) for key in keys)
    return names if count <= NAMED else f"{count} pictures ({names}, …)"
