"""Which model, how long, from which seed."""

from __future__ import annotations

from pydantic import Field

from sdxl_core.sections import Section, WeightsName


class RunOptions(Section):
    base_model: WeightsName = Field(
        "tiny",
        description="single-file SDXL .safetensors, a diffusers folder, or 'tiny' (small, random weights)",
    )
    max_train_steps: int = Field(1000, ge=1, description="optimizer steps")
    max_train_epochs: int | None = Field(None, ge=1, description="epochs; replaces max_train_steps")
    seed: int = Field(0, ge=0, lt=2**63, description="order, noise, timesteps, captions and rounding follow from it")
