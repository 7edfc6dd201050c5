"""Component configs that ship with the package: `sdxl` as the official base 1.0 has them, `tiny` for a laptop."""

from __future__ import annotations

import gzip
from collections.abc import Mapping
from functools import cache
from importlib.resources import files
from typing import Any, Literal, get_args

import orjson

Preset = Literal["sdxl", "tiny"]
Component = Literal["unet", "vae", "text_encoder", "text_encoder_2", "scheduler"]
PRESETS: tuple[Preset, ...] = get_args(Preset)
MODEL_COMPONENTS: tuple[Component, ...] = ("unet", "text_encoder", "text_encoder_2", "vae")


@cache
def _read(preset: Preset, component: Component) -> bytes:
    return files("sdxl_core.models").joinpath("configs", preset, f"{component}.json").read_bytes()


def component_config(preset: Preset, component: Component) -> dict[str, Any]:
    """A component's constructor arguments, as diffusers and transformers name them. A fresh dict each time."""
    config: dict[str, Any] = orjson.loads(_read(preset, component))
    return config


@cache
def tensor_shapes(preset: Preset, part: Component, *, original: bool = False) -> Mapping[str, tuple[int, ...]]:
    """Names and shapes of a model part as a diffusers folder has them, or (original) a single file."""
    packed = files("sdxl_core.models").joinpath("configs", preset, "tensors.json.gz").read_bytes()
    shapes = orjson.loads(gzip.decompress(packed))[part]["original" if original else "folder"]
    return {key: tuple(shape) for key, shape in shapes.items()}
