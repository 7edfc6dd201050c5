"""What is written, how often, and what is looked at on the way."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from pydantic import Field

from sdxl_core.sections import Section


class SavingOptions(Section):
    output_name: str = Field("last", pattern=r"^[A-Za-z0-9._-]+$", description="file name of the trained model")
    save_every_steps: int = Field(0, ge=0, description="write the resumable state every this many steps; 0: at the end")
    save_every_epochs: int = Field(0, ge=0, description="write the resumable state every this many epochs; 0: do not")
    save_every_minutes: float = Field(0, ge=0, description="write the resumable state this often; 0: do not")
    keep_states: int = Field(2, ge=2, description="how many resumable states are kept")
    save_model_every_steps: int = Field(
        0, ge=0, description="write a state and a model file every this many steps; 0: only at the end"
    )
    save_model_every_epochs: int = Field(
        0, ge=0, description="write a state and a model file every this many epochs; 0: only at the end"
    )
    keep_models: int = Field(0, ge=0, description="how many of these model files are kept, besides the last; 0: all")
    max_bad_steps: int = Field(
        0,
        ge=0,
        description="steps whose loss or gradient is not finite (or spikes) are left out, this many of any 1,000; one "
        "more ends the run. 0: the first one does",
    )
    spike_factor: float = Field(
        0.0,
        ge=0,
        description="a step is bad, too, where its gradient norm (fused_backward: its loss) is this many times the "
        "running average; 0 is off",
    )
    snapshot_every_steps: int = Field(
        100, ge=1, description="with fused_backward: a copy in main memory to go back to, at most this many steps old"
    )
    save_precision: Literal["fp16", "bf16", "fp32"] = Field("fp16", description="precision of the trained model")
    save_model_as: Literal["safetensors", "diffusers"] = Field(
        "safetensors", description="one file as user interfaces read it, or a diffusers folder"
    )
    modelspec: dict[str, str] = Field(
        {},
        description="what the model's metadata says besides: {author = 'me', license = 'CreativeML Open RAIL++-M'}; "
        "title, description, tags, trigger_phrase, usage_hint, merged_from likewise",
    )


class PreviewOptions(Section):
    log_prefix: str = Field("", pattern=r"^[A-Za-z0-9._-]*$", description="in front of the TensorBoard run's name")
    sample_prompts: list[str] = Field(
        [],
        description="prompts of the preview pictures; options may follow: --n negative --w width --h height --d seed "
        "--l guidance --s steps",
    )
    sample_prompts_file: Path | None = Field(
        None, description="a text file with one more prompt a line; # is a comment"
    )
    sample_every_steps: int = Field(0, ge=0, description="previews every this many steps; 0: only at the end")
    sample_every_epochs: int = Field(0, ge=0, description="previews every this many epochs; 0: do not")
    sample_at_first: bool = Field(False, description="previews before the first step, too")
    sample_inference_steps: int = Field(20, ge=1, le=1000, description="denoising steps of a preview (DDIM)")
    sample_guidance_scale: float = Field(7.5, ge=1, description="classifier-free guidance of a preview")
    sample_size_px: int = Field(1024, ge=64, le=4096, multiple_of=8, description="side of the square previews")
