"""What trains, at which rate, by which optimizer."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, field_validator, model_validator

from sdxl_core.sections import Section


class OptimizerOptions(Section):
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

    @field_validator("adam_betas")
    @classmethod
    def betas_below_one(cls, value: tuple[float, float]) -> tuple[float, float]:
        if not all(0 <= beta < 1 for beta in value):
            raise ValueError("both must be in [0, 1)")
        return value

    @model_validator(mode="after")
    def something_trains(self) -> OptimizerOptions:
        if not (self.learning_rate or self.learning_rate_te1 or self.learning_rate_te2):
            raise ValueError("learning_rate, learning_rate_te1 and learning_rate_te2 are all 0: nothing would train")
        return self
