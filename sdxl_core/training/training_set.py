"""The pictures a run trains on, as meta_lat.json names them. Light: read by the launching process too."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sdxl_core.config import TrainConfig
from sdxl_core.dataset.metadata import read_metadata
from sdxl_core.errors import ConfigError, DataError
from sdxl_core.files import digest_of
from sdxl_core.latents import LatentStore

NAMED = 3  # how many samples an error message names


@dataclass(frozen=True, slots=True, kw_only=True)
class Sample:
    """One picture. `sentence`, `tags`: "" where there is none.   width_px, height_px: of its bucket."""

    key: str
    sentence: str
    tags: str
    width_px: int
    height_px: int


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainingSet:
    """All samples in the order of meta_lat.json.

    `digest`: 64 hex digits over keys, texts, buckets and, where a ledger knows them, the latents.
    """

    samples: tuple[Sample, ...]
    digest: str


def read_training_set(config: TrainConfig) -> TrainingSet:
    """Read meta_lat.json and check that each of its pictures has latents.

    Raises: ConfigError: no such file or folder.   DataError: not our JSON; entries without
            `train_resolution`; latents missing (the first few are named).
    """
    if not config.metadata.is_file():
        raise ConfigError(
            f"metadata = {config.metadata}: there is no such file. Run cache-latents first; it writes it."
        )
    if not config.latents.is_dir():
        raise ConfigError(f"latents = {config.latents}: there is no such folder. Run cache-latents first.")
    entries = read_metadata(config.metadata)
    samples = tuple(_sample(config.metadata, key, entry) for key, entry in entries.items())
    store = LatentStore(config.latents)
    missing = [sample.key for sample in samples if not store.has(sample.key)]
    if missing:
        raise DataError(
            f"{config.latents}: holds no latents of {_named(missing)} that {config.metadata} names. "
            f"Run cache-latents again; finished pictures are not redone."
        )
    return TrainingSet(samples=samples, digest=_digest(samples, store))


def _sample(metadata: Path, key: str, entry: dict[str, Any]) -> Sample:
    bucket = entry.get("train_resolution")
    if bucket is None:
        raise DataError(
            f"{metadata}: {key!r} has no train_resolution, so it has no latents. Is this meta_cap_dd.json? Training "
            f"reads the meta_lat.json that cache-latents writes."
        )
    width_px, height_px = bucket
    if width_px % 8 or height_px % 8:
        raise DataError(f"{metadata}: {key!r} has train_resolution {bucket}; sides must be multiples of 8 px.")
    return Sample(
        key=key,
        sentence=entry.get("caption", ""),
        tags=entry.get("tags", ""),
        width_px=width_px,
        height_px=height_px,
    )


def _digest(samples: tuple[Sample, ...], store: LatentStore) -> str:
    rows = ((s.key, s.sentence, s.tags, s.width_px, s.height_px, str(store.crc32(s.key))) for s in samples)
    return digest_of(*(part for row in rows for part in row))


def _named(keys: list[str]) -> str:
    names = ", ".join(repr(key) for key in keys[:NAMED])
    return names if len(keys) <= NAMED else f"{len(keys)} pictures ({names}, …)"
