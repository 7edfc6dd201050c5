"""Parameters of the trainer."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from pydantic import Field, field_validator, model_validator

from sdxl_core.sections import Section


class TrainOptions(Section):
    base_model: str = Field(
        "tiny",
        description="single-file SDXL .safetensors, a diffusers folder, or 'tiny' (small, random weights)",
    )
    output_name: str = Field("last", pattern=r"^[A-Za-z0-9._-]+$", description="file name of the trained model")
    max_train_steps: int = Field(1000, ge=1, description="optimizer steps")
    max_train_epochs: int | None = Field(None, ge=1, description="epochs; replaces max_train_steps")
    train_batch_size: int = Field(1, ge=1, le=4096, description="pictures a micro-batch, all of one bucket")
    gradient_accumulation_steps: int = Field(1, ge=1, le=4096, description="micro-batches an optimizer step")
    learning_rate: float = Field(4e-7, ge=0, le=1, description="of the U-Net; 0 freezes it")
    learning_rate_te1: float = Field(0.0, ge=0, le=1, description="of text encoder 1 (CLIP-L); 0 freezes it")
    learning_rate_te2: float = Field(0.0, ge=0, le=1, description="of text encoder 2 (bigG); 0 freezes it")
    lr_scheduler: Literal["constant", "constant_with_warmup", "linear", "cosine"] = Field(
        "constant", description="learning-rate schedule"
    )
    lr_warmup_steps: int = Field(0, ge=0, description="optimizer steps of linear warm-up")
    optimizer: Literal["adamw", "adamw8bit"] = Field("adamw8bit", description="adamw8bit is bitsandbytes' AdamW8bit")
    weight_decay: float = Field(0.01, ge=0, le=1, description="AdamW's decoupled weight decay")
    adam_betas: tuple[float, float] = Field((0.9, 0.999), description="AdamW's beta1 and beta2")
    adam_epsilon: float = Field(1e-8, gt=0, description="AdamW's epsilon")
    max_grad_norm: float = Field(1.0, ge=0, description="joint L2 norm of all gradients is clipped to this; 0 is off")
    weights_dtype: Literal["float32", "bfloat16"] = Field(
        "bfloat16",
        description="bfloat16: weights held in bf16 and updated with stochastic rounding, so that small steps count; "
        "float32: full weights, twice the memory",
    )
    mixed_precision: Literal["no", "bf16"] = Field("bf16", description="precision of forward and backward")
    gradient_checkpointing: bool = Field(True, description="recompute activations: less memory, about a third slower")
    noise_offset: float = Field(0.0, ge=0, le=1, description="adds this times one normal value a channel to the noise")
    min_snr_gamma: float | None = Field(None, gt=0, description="min-SNR loss weighting (arXiv:2303.09556); 5 is usual")
    caption_separator: str = Field(", ", min_length=1, description="between sentence and tags, and between tags")
    shuffle_caption: bool = Field(False, description="tags in another order each epoch")
    keep_tokens: int = Field(0, ge=0, description="this many first tags stay in front when shuffling")
    caption_dropout_rate: float = Field(0.0, ge=0, le=1, description="share of captions replaced by the empty one")
    max_token_length: Literal[75, 150, 225] = Field(75, description="caption tokens the text encoders see")
    save_every_steps: int = Field(0, ge=0, description="write the resumable state every this many steps; 0: at the end")
    save_precision: Literal["fp16", "bf16", "fp32"] = Field("fp16", description="precision of the .safetensors")
    log_prefix: str = Field("", pattern=r"^[A-Za-z0-9._-]*$", description="in front of the TensorBoard run's name")
    sample_prompts: list[str] = Field([], description="prompts of the preview pictures")
    sample_every_steps: int = Field(0, ge=0, description="previews every this many steps; 0: only at the end")
    sample_inference_steps: int = Field(20, ge=1, le=1000, description="denoising steps of a preview (DDIM)")
    sample_guidance_scale: float = Field(7.5, ge=1, description="classifier-free guidance of a preview")
    sample_size_px: int = Field(1024, ge=64, le=4096, multiple_of=8, description="side of the square previews")
    seed: int = Field(0, ge=0, lt=2**63, description="order, noise, timesteps, captions and rounding follow from it")
    num_processes: int = Field(1, ge=1, le=64, description="training processes, one a card (data parallel)")
    use_cpu: bool | None = Field(None, description="train on the CPU; left out: only where no CUDA card is found")

    @field_validator("adam_betas")
    @classmethod
    def betas_below_one(cls, value: tuple[float, float]) -> tuple[float, float]:
        if not all(0 <= beta < 1 for beta in value):
            raise ValueError("both must be in [0, 1)")
        return value

    @model_validator(mode="after")
    def something_trains(self) -> TrainOptions:
        if not (self.learning_rate or self.learning_rate_te1 or self.learning_rate_te2):
            raise ValueError("learning_rate, learning_rate_te1 and learning_rate_te2 are all 0: nothing would train")
        return self


class TrainConfig(TrainOptions):
    """Fine-tune SDXL on cached latents and write a single-file checkpoint."""

    metadata: Path = Field(description="meta_lat.json of the latent cache")
    latents: Path = Field(description="folder of the cached .npz latents")
    out: Path = Field(description="folder that receives model/, state/, tensorboard/ and samples/")
