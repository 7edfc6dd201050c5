"""Parameters of converting a model between its two forms."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from pydantic import Field

from sdxl_core.sections import Section


class ConvertModelConfig(Section):
    """Write an SDXL model in its other form: one .safetensors file, or a diffusers folder; or in another precision."""

    model: Path = Field(description="single-file SDXL .safetensors, or a diffusers folder")
    out: Path = Field(description="what to write: a name that ends in .safetensors is one file, any other a folder")
    precision: Literal["fp16", "bf16", "fp32"] = Field("fp16", description="of every tensor that is written")
    title: str = Field("", description="title in the file's metadata; empty: as it was, or the name of the file")
