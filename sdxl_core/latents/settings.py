"""The settings a latent set was made with: remembered beside it, and others are refused by the field that differs."""

from __future__ import annotations

import importlib.metadata
from pathlib import Path
from typing import Any

import orjson

from sdxl_core.config import CacheLatentsConfig
from sdxl_core.errors import ConfigError, DataError, ShardError
from sdxl_core.files import digest_of, write_atomic
from sdxl_core.latents.rows import ENDING, FORMAT, LEDGER_FOLDER
from sdxl_core.latents.tables import checked_json, parse_checked, read_words

VAE, CONFIG = "vae.json", "config.json"
IMPORTED = "was imported, and how its latents were made is not known, so nothing is ever encoded into it."

# Settings that change what is stored; the others only change how fast it is made.
SHAPING = (
    "resolution_px", "min_bucket_px", "max_bucket_px", "bucket_step_px", "no_upscale", "dtype", "batch_size", "compat",
    "background", "min_side_px", "max_image_megapixels", "max_cropped_share", "seed", "layout", "packed_dtype",
    "npz_naming", "flip_aug", "alpha_mask", "logvar", "compile",
)  # fmt: skip
_OF_LAYOUT = {"packed_dtype": "packed", "npz_naming": "per_image"}


def check_settings(config: CacheLatentsConfig) -> str:
    """The settings' fingerprint; `out` remembers them, and refuses others by the field that differs.

    Raises: ConfigError: other settings.   DataError: what was remembered is damaged.
    """
    settings: dict[str, Any] = {"format": FORMAT, "vae": _vae_fingerprint(config)}
    settings |= {
        name: getattr(config, name) for name in SHAPING if _OF_LAYOUT.get(name, config.layout) == config.layout
    }
    path = settings_path(config.out / "latents")
    if not path.exists():
        _check_shards(path, fingerprint_of(settings))
        write_atomic(path, orjson.dumps(settings, option=orjson.OPT_INDENT_2))
    old = read_settings(config.out / "latents")
    if "made_by" in old:
        raise ConfigError(f"{config.out / 'latents'}: {IMPORTED} Choose another out folder.")
    for name, value in settings.items():
        if old.get(name) != value:
            raise _refused(config, name, old.get(name), value)
    return fingerprint_of(old)


def _check_shards(path: Path, fingerprint: str) -> None:
    """Raises: ConfigError: the settings' file is gone, and shards that are there were cut for other settings."""
    for rows in path.parent.glob(f"*{ENDING}"):
        try:
            had = read_words(rows).get("fingerprint", fingerprint)
        except ShardError:
            continue
        if had != fingerprint:
            raise ConfigError(
                f"{path}: is gone, and the latents beside it were made with other settings than these. Put it back, "
                f"run with the settings of then, choose another out folder, or delete {path.parents[1]}."
            )


def _vae_fingerprint(config: CacheLatentsConfig) -> str:
    """The VAE's identity, kept beside the settings as long as its files are the same: reading it takes seconds."""
    path = config.out / "latents" / LEDGER_FOLDER / VAE
    looks = _looks_of(config.vae)
    told = parse_checked(path.read_bytes()) if path.exists() else None
    if told is not None and told["looks"] == looks:
        return str(told["fingerprint"])
    from sdxl_core.models.load import vae_fingerprint

    fingerprint = vae_fingerprint(config.vae)
    write_atomic(path, checked_json({"looks": looks, "fingerprint": fingerprint}))
    return fingerprint


def _looks_of(vae: str) -> str:
    """Names, sizes and times of a VAE's files; of the tiny preset, which has none, what it is made from."""
    if vae == "tiny":
        preset = Path(__file__).parents[1] / "models" / "configs" / "tiny" / "vae.json"
        versions = (importlib.metadata.version(name) for name in ("torch", "diffusers"))
        return digest_of(preset.read_bytes(), *versions)
    path = Path(vae).absolute()
    files = sorted(path.rglob("*")) if path.is_dir() else [path] if path.exists() else []
    return digest_of(str(path), *(f"{file}|{file.stat().st_size}|{file.stat().st_mtime_ns}" for file in files))


def settings_path(latents: Path) -> Path:
    return latents / LEDGER_FOLDER / "settings.json"


def latents_folder(path: Path) -> Path:
    """The latents folder of a run folder, or the folder itself. Raises: DataError: neither."""
    for folder in (path, path / "latents"):
        if (folder / LEDGER_FOLDER).is_dir():
            return folder
    raise _no_set(path if path.name == "latents" else path / "latents")


def read_settings(latents: Path) -> dict[str, Any]:
    """What a latent set was made with. Raises: DataError: unknown, or damaged."""
    path = settings_path(latents)
    try:
        stored = orjson.loads(path.read_bytes())
    except (FileNotFoundError, NotADirectoryError) as error:
        raise _no_set(latents) from error
    except orjson.JSONDecodeError:
        stored = None
    if not isinstance(stored, dict):
        raise DataError(
            f"{path}: damaged, so it is not known with which settings these latents were made. Put a copy of it back, "
            f"or delete {latents} and encode again."
        )
    return stored


def _no_set(latents: Path) -> DataError:
    return DataError(
        f"{latents}: not a latent set of ours (it has no {settings_path(latents).relative_to(latents)}). Name the out "
        f"folder of cache-latents, or its latents folder."
    )


def remember_config(config: CacheLatentsConfig) -> None:
    """Keep what a set was last made with, for whoever goes on with it from another folder (`verify --repair`)."""
    paths = {name: getattr(config, name) for name in ("source", "manifest", "metadata", "out")}
    absolute: dict[str, Path | str] = {name: path.absolute() for name, path in paths.items() if path is not None}
    if config.vae != "tiny" and Path(config.vae).exists():
        absolute["vae"] = str(Path(config.vae).absolute())
    path = config.out / "latents" / LEDGER_FOLDER / CONFIG
    text = config.model_copy(update=absolute).model_dump_json(indent=2).encode()
    if not (path.exists() and path.read_bytes() == text):
        write_atomic(path, text)


def stored_config(latents: Path) -> CacheLatentsConfig:
    """What the set was last made with, its place as it is now. Raises: DataError: not known."""
    path = latents / LEDGER_FOLDER / CONFIG
    try:
        config = CacheLatentsConfig.model_validate_json(path.read_bytes())
    except (FileNotFoundError, ValueError) as error:
        if "made_by" in read_settings(latents):
            raise DataError(
                f"{latents}: {IMPORTED} Put whole files in the place of bad ones, and run import-latents again: it "
                f"takes what is whole."
            ) from error
        raise DataError(
            f"{path}: gone or damaged, so it is not known how to encode again what is bad; nothing was taken out. Run "
            f"cache-latents with its parameters once, which keeps them and encodes nothing that is there, then this."
        ) from error
    return config.model_copy(update={"out": latents.parent})


def fingerprint_of(settings: dict[str, Any]) -> str:
    """64 hex digits: the settings' identity."""
    return digest_of(orjson.dumps(settings, option=orjson.OPT_SORT_KEYS))


def _refused(config: CacheLatentsConfig, name: str, old: Any, new: Any) -> ConfigError:
    shown = "other weights than" if name == "vae" else f"{name} = {old!r}, not"
    now = f"vae = {config.vae}" if name == "vae" else repr(new)
    return ConfigError(
        f"{config.out / 'latents'} was made with {shown} {now}. Latents of different settings are never mixed: set "
        f"{name} back, choose another out folder, or delete {config.out / 'latents'}."
    )
