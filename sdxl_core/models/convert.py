"""One SDXL model in its two forms: original single file and diffusers folder."""

from __future__ import annotations

import os
from pathlib import Path

import orjson

from sdxl_core.config.convert import ConvertModelConfig
from sdxl_core.errors import ConfigError
from sdxl_core.models.load import load_models
from sdxl_core.models.single_file import (
    DTYPES,
    METADATA_FILE,
    modelspec_metadata,
    save_diffusers_folder,
    save_single_file,
)
from sdxl_core.models.weights import WeightFile
from sdxl_core.progress import Progress, no_progress
from sdxl_core.refs import FileRef

SINGLE_FILE = ".safetensors"


def convert_model(config: ConvertModelConfig, *, progress: Progress = no_progress) -> FileRef:
    """Read `model`, write `out`. Weights go through one cast; what the model says of itself (metadata, v prediction and

    zero-terminal SNR) goes along. Returns the file, or of a folder its path, size and a digest over its files.
    Raises: as `load_models`, `save_single_file`; ConfigError: `out` is `model`, or a folder that holds other things.
    """
    _refuse_overwriting(config)
    models = load_models(str(config.model), dtype=DTYPES[config.precision])
    metadata = _metadata(config) | models.prediction.modelspec()
    progress("convert", 0, 1, f"writing {config.out}")
    if config.out.suffix == SINGLE_FILE:
        ref = save_single_file(config.out, models, precision=config.precision, metadata=metadata)
    else:
        ref = save_diffusers_folder(config.out, models, precision=config.precision, metadata=metadata)
    progress("convert", 1, 1, "done")
    return ref


def read_metadata_of(model: Path) -> dict[str, str]:
    """What a single file, or a folder that we wrote, says of itself; {} where nothing is said."""
    if not model.is_dir():
        return dict(WeightFile(model).metadata)
    try:
        told: dict[str, str] = orjson.loads((model / METADATA_FILE).read_bytes())
        return told
    except (FileNotFoundError, orjson.JSONDecodeError):
        return {}


def _refuse_overwriting(config: ConvertModelConfig) -> None:
    out = config.out
    if os.path.realpath(out) == os.path.realpath(config.model):
        raise ConfigError(f"out = {out}: this is the model itself. Choose another name.")
    if out.suffix == SINGLE_FILE:
        if out.is_dir():
            raise ConfigError(f"out = {out}: a folder of this name is there. Choose another name.")
    elif out.is_file():
        raise ConfigError(f"out = {out}: this is a file. A single file must end in .safetensors.")
    elif out.is_dir() and any(out.iterdir()) and not (out / METADATA_FILE).exists():
        raise ConfigError(f"out = {out}: this folder holds other things. Choose a new one.")


def _metadata(config: ConvertModelConfig) -> dict[str, str]:
    told = {key: value for key, value in read_metadata_of(config.model).items() if key != "format"}
    fresh = modelspec_metadata(title=config.title or told.get("modelspec.title") or config.out.stem)
    kept = told if "modelspec.title" in told else told | fresh
    return kept | {"modelspec.title": fresh["modelspec.title"]}
