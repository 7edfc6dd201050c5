"""Where and how large: processes, batches, dtypes, what is recomputed."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, field_validator, model_validator

from sdxl_core.sections import Section


class MemoryOptions(Section):
    train_batch_size: int = Field(1, ge=1, le=4096, description="pictures a micro-batch, all of one bucket")
    gradient_accumulation_steps: int = Field(1, ge=1, le=4096, description="micro-batches an optimizer step")
    weights_dtype: Literal["float32", "bfloat16"] = Field(
        "bfloat16",
        description="bfloat16: weights held in bf16 and updated with stochastic rounding, so that small steps count; "
        "float32: full weights, twice the memory",
    )
    mixed_precision: Literal["no", "bf16"] = Field("bf16", description="precision of forward and backward")
    gradient_checkpointing: Literal["none", "blocks", "all"] = Field(
        "all",
        description="what is computed again in the backward pass instead of being kept: nothing; the U-Net's "
        "attention blocks; these, its residual blocks and trained text encoders (least memory, about a third slower)",
    )
    fused_backward: bool = Field(
        False,
        description="update each weight as soon as its gradient is there, so that gradients are never held together: "
        "one process, no accumulation; max_grad_norm then clips each weight's gradient by itself",
    )
    parallel: Literal["ddp", "fsdp"] = Field(
        "ddp",
        description="several processes: ddp, each holds all of the model; fsdp, weights, gradients and optimizer "
        "states are divided among them",
    )
    freeze: list[str] = Field(
        [],
        description="patterns (* and ?) of weights that stay as they are, e.g. 'unet.down_blocks.0.*' or "
        "'text_encoder2.*embed*'",
    )
    cache_text_encoder_outputs: bool = Field(
        False, description="frozen text encoders run once before training; their outputs are read from disk"
    )
    torch_compile: bool = Field(False, description="compile the U-Net with torch.compile")
    ema_decay: float | None = Field(
        None, gt=0, lt=1, description="keep an average of the weights (float32, in main memory); 0.9999 is usual"
    )
    ema_every_steps: int = Field(10, ge=1, description="optimizer steps between two updates of that average")
    num_processes: int = Field(1, ge=1, le=64, description="training processes, one a card (data parallel)")
    use_cpu: bool | None = Field(None, description="train on the CPU; left out: only where no CUDA card is found")

    @field_validator("gradient_checkpointing", mode="before")
    @classmethod
    def on_is_all(cls, value: object) -> object:
        return ("all" if value else "none") if isinstance(value, bool | int) else value

    @model_validator(mode="after")
    def fused_is_alone(self) -> MemoryOptions:
        if self.fused_backward and (self.num_processes > 1 or self.gradient_accumulation_steps > 1):
            raise ValueError(
                "fused_backward updates weights during the backward pass, so it needs num_processes = 1 and "
                "gradient_accumulation_steps = 1; on several cards parallel = 'fsdp' saves as much"
            )
        return self
