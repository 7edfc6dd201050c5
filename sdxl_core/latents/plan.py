"""Which pictures a metadata JSON names, where they are, and how they fall into shards; and the settings they share."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import orjson
from pydantic.dataclasses import dataclass

from sdxl_core.config import CacheLatentsConfig
from sdxl_core.dataset.listing import ImageFile, scan_images
from sdxl_core.dataset.metadata import read_metadata
from sdxl_core.errors import ConfigError, DataError
from sdxl_core.files import digest_of, write_atomic
from sdxl_core.latents.ledger import LEDGER_FOLDER
from sdxl_core.refs import ShardRef

FORMAT = 1
# Settings that change what is stored; the others only change how fast it is made.
SHAPING = (
    "resolution_px", "min_bucket_px", "max_bucket_px", "bucket_step_px", "no_upscale", "dtype", "batch_size", "compat",
    "background", "min_side_px", "max_image_megapixels", "max_cropped_share", "seed",
)  # fmt: skip


@dataclass(frozen=True, slots=True, kw_only=True)
class LatentPlan:
    """A latent cache to be made. `fingerprint`: identity of the settings. `num_seen`: entries of the metadata."""

    shards: tuple[ShardRef, ...]
    fingerprint: str
    num_seen: int


def plan_latents(config: CacheLatentsConfig) -> LatentPlan:
    """Resolve every key to a picture, check the settings against what `out` holds, and cut into shards.

    Writes each shard's rows to `out/latents/.ledger/`. No picture is opened.
    Raises: ConfigError: missing source, VAE or metadata; `out` belongs to other settings.   DataError.
    """
    metadata = read_metadata(config.metadata)
    if not config.source.is_dir():
        raise ConfigError(f"source = {config.source}: no such folder. Name the one that holds the pictures.")
    fingerprint = _check_settings(config)
    rows = _resolve(config, metadata)
    folder = config.out / "latents" / LEDGER_FOLDER
    shards = []
    for index, start in enumerate(range(0, len(rows), config.shard_size)):
        stop = min(start + config.shard_size, len(rows))
        body = orjson.dumps(rows[start:stop])
        digest = digest_of(FORMAT, fingerprint, config.commit_size, body)
        path = folder / f"{digest[:32]}.rows.json"
        if not (path.exists() and path.stat().st_size == len(body)):
            write_atomic(path, body)
        shards.append(ShardRef(index=index, start=start, stop=stop, digest=digest, path=path))
    return LatentPlan(shards=tuple(shards), fingerprint=fingerprint, num_seen=len(rows))


def ledger_path(shard: ShardRef) -> Path:
    """Where a shard's ledger is."""
    return shard.path.with_suffix("").with_suffix(".ledger.jsonl")


def _check_settings(config: CacheLatentsConfig) -> str:
    """The settings' fingerprint; `out` remembers them, and refuses others by the field that differs."""
    from sdxl_core.models.load import vae_fingerprint

    settings: dict[str, Any] = {"format": FORMAT, "vae": vae_fingerprint(config.vae)}
    settings |= {name: getattr(config, name) for name in SHAPING}
    path = config.out / "latents" / LEDGER_FOLDER / "settings.json"
    if path.exists():
        old = _stored_settings(path)
        for name, value in settings.items():
            if old.get(name) != value:
                shown = "other weights than" if name == "vae" else f"{name} = {old.get(name)!r}, not"
                now = f"vae = {config.vae}" if name == "vae" else repr(value)
                raise ConfigError(
                    f"{config.out / 'latents'} was made with {shown} {now}. Latents of different settings are never "
                    f"mixed: set {name} back, choose another out folder, or delete {config.out / 'latents'}."
                )
    else:
        write_atomic(path, orjson.dumps(settings, option=orjson.OPT_INDENT_2))
    return digest_of(orjson.dumps(settings, option=orjson.OPT_SORT_KEYS))


def _stored_settings(path: Path) -> dict[str, Any]:
    try:
        stored = orjson.loads(path.read_bytes())
    except orjson.JSONDecodeError:
        stored = None
    if not isinstance(stored, dict):
        raise DataError(
            f"{path}: damaged, so it is not known with which settings these latents were made. Put a copy of it back, "
            f"or delete {path.parent.parent} and encode again."
        )
    return stored


def _resolve(config: CacheLatentsConfig, metadata: Mapping[str, Any]) -> list[list[Any]]:
    """A row a key: [key, name below the source, size in bytes, mtime_ns], or [key, reason, detail] if rejected."""
    images = scan_images(config.source)
    by_name = {image.name: image for image in images}
    by_key: dict[str, ImageFile] = {}
    for image in images:
        by_key.setdefault(image.key, image)
    owner: dict[str, str] = {}
    rows: list[list[Any]] = []
    for key in metadata:
        name = _name_below_source(key, config)
        found = by_key.get(name) or by_name.get(name)
        if found is None:
            rows.append([key, "missing_image", f"no picture for it in {config.source}"])
        elif owner.setdefault(found.key, key) != key:
            rows.append([key, "duplicate_key", f"{found.name} is already there as {owner[found.key]}"])
        else:
            rows.append([key, found.name, found.num_bytes, found.mtime_ns])
    return rows


def _name_below_source(key: str, config: CacheLatentsConfig) -> str:
    """A key as a POSIX path below the source: root mapping applied, the source's own path taken off."""
    name = key.replace("\\", "/") if config.root_map else key
    for old, new in config.root_map.items():
        if name.startswith(old.replace("\\", "/")):
            name = new + name[len(old) :]
            break
    for prefix in (str(config.source), os.path.abspath(config.source)):
        if name.startswith(prefix.rstrip("/") + "/"):
            return name[len(prefix.rstrip("/")) + 1 :]
    return name
