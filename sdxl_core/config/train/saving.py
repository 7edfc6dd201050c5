"""What is written, how often, and what is looked at on the way."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from sdxl_core.sections import Section


class SavingOptions(Section):
    output_name: str = Field("last", pattern=r"^[A-Za-z0-9._-]+$", description="file name of the trained model")
    save_every_steps: int = Field(0, ge=0, description="write the resumable state every this many steps; 0: at the end")
    save_precision: Literal["fp16", "bf16", "fp32"] = Field("fp16", description="precision of the .safetensors")


class PreviewOptions(Section):
    log_prefix: str = Field("", pattern=r"^[A-Za-z0-9._-]*$", description="in front of the TensorBoard run's name")
    sample_prompts: list[str] = Field([], description="prompts of the preview pictures")
    sample_every_steps: int = Field(0, ge=0, description="previews every this many steps; 0: only at the end")
    sample_inference_steps: int = Field(20, ge=1, le=1000, description="denoising steps of a preview (DDIM)")
    sample_guidance_scale: float = Field(7.5, ge=1, description="classifier-free guidance of a preview")
    sample_size_px: int = Field(1024, ge=64, le=4096, multiple_of=8, description="side of the square previews")
