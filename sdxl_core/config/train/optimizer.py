"""What trains, at which rate, by which optimizer."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field, field_validator, model_validator

from sdxl_core.sections import Section

ScheduleName = Literal[
    "constant", "constant_with_warmup", "linear", "cosine", "cosine_with_restarts", "polynomial", "warmup_stable_decay"
]
NUM_BLOCK_RATES = 23
NAMED_OPTIMIZERS = ("adamw", "adamw8bit", "pagedadamw8bit", "lion8bit", "adafactor")


class OptimizerOptions(Section):
    learning_rate: float = Field(4e-7, ge=0, le=1, description="of the U-Net; 0 freezes it")
    learning_rate_te1: float = Field(0.0, ge=0, le=1, description="of text encoder 1 (CLIP-L); 0 freezes it")
    learning_rate_te2: float = Field(0.0, ge=0, le=1, description="of text encoder 2 (bigG); 0 freezes it")
    block_lr: tuple[float, ...] = Field(
        (),
        description="23 rates of the U-Net's blocks, in place of learning_rate; 0 freezes a block: time and size "
        "embeddings, 9 input blocks, 3 middle blocks, 9 output blocks, output layer",
    )
    lr_scheduler: ScheduleName = Field("constant", description="learning-rate schedule")
    lr_warmup_steps: float = Field(
        0, ge=0, description="optimizer steps of linear warm-up; below 1: as a share of all steps"
    )
    lr_decay_steps: float = Field(
        0, ge=0, description="warmup_stable_decay: the last steps, in which the rate falls; below 1: as a share"
    )
    lr_scheduler_num_cycles: int = Field(1, ge=1, description="cosine_with_restarts: how often it starts again")
    lr_scheduler_power: float = Field(1.0, gt=0, description="polynomial: the power")
    lr_scheduler_min_lr_ratio: float = Field(
        0.0, ge=0, le=1, description="polynomial and warmup_stable_decay: where the rate ends, as a share of itself"
    )
    optimizer: str = Field(
        "adamw8bit",
        description="adamw, adamw8bit, pagedadamw8bit, lion8bit (bitsandbytes'), adafactor, or module.Class of any "
        "torch optimizer",
    )
    optimizer_args: dict[str, Any] = Field(
        {}, description="more arguments of the optimizer, e.g. {betas = [0.9, 0.95]}"
    )
    weight_decay: float = Field(0.01, ge=0, le=1, description="decoupled weight decay; not of a module.Class")
    adam_betas: tuple[float, float] = Field((0.9, 0.999), description="AdamW's beta1 and beta2")
    adam_epsilon: float = Field(1e-8, gt=0, description="AdamW's epsilon")
    weights_rounding: Literal["stochastic", "kahan"] = Field(
        "stochastic",
        description="how small updates survive in bf16 weights: stochastic rounding, or kahan, which keeps what "
        "rounding left over (2 bytes a weight more, exact)",
    )
    max_grad_norm: float = Field(1.0, ge=0, description="joint L2 norm of all gradients is clipped to this; 0 is off")

    @field_validator("adam_betas")
    @classmethod
    def betas_below_one(cls, value: tuple[float, float]) -> tuple[float, float]:
        if not all(0 <= beta < 1 for beta in value):
            raise ValueError("both must be in [0, 1)")
        return value

    @field_validator("block_lr")
    @classmethod
    def a_rate_a_block(cls, value: tuple[float, ...]) -> tuple[float, ...]:
        if len(value) not in (0, NUM_BLOCK_RATES) or not all(0 <= rate <= 1 for rate in value):
            raise ValueError(
                f"these are {len(value)} rates; {NUM_BLOCK_RATES} in [0, 1] are needed: 1 for the time and size "
                f"embeddings, 9 input blocks, 3 middle blocks, 9 output blocks, 1 output layer"
            )
        return value

    @field_validator("optimizer")
    @classmethod
    def a_known_optimizer(cls, value: str) -> str:
        plain = value.lower().replace("_", "").replace("-", "")
        if plain in NAMED_OPTIMIZERS:
            return plain
        if "." not in value.strip("."):
            raise ValueError(
                f"there is no optimizer of this name; choose {', '.join(NAMED_OPTIMIZERS)}, or module.Class of an "
                f"installed package, such as torch.optim.RAdam"
            )
        return value

    @model_validator(mode="after")
    def something_trains(self) -> OptimizerOptions:
        if not (self.unet_rate or self.learning_rate_te1 or self.learning_rate_te2):
            raise ValueError("learning_rate, learning_rate_te1 and learning_rate_te2 are all 0: nothing would train")
        return self

    @model_validator(mode="after")
    def schedule_has_what_it_needs(self) -> OptimizerOptions:
        if self.lr_scheduler == "constant" and self.lr_warmup_steps:
            raise ValueError("lr_scheduler = constant has no warm-up; choose constant_with_warmup")
        if self.lr_decay_steps and self.lr_scheduler != "warmup_stable_decay":
            raise ValueError(f"lr_decay_steps belongs to warmup_stable_decay; {self.lr_scheduler} has no such phase")
        if self.lr_scheduler == "warmup_stable_decay" and not self.lr_decay_steps:
            raise ValueError("lr_scheduler = warmup_stable_decay needs lr_decay_steps, e.g. 0.2: the last fifth")
        return self

    @property
    def unet_rate(self) -> float:
        """The U-Net's highest rate; 0: it is frozen."""
        return max(self.block_lr, default=self.learning_rate)
