"""Parameters of the trainer: one file a topic, one flat section in a job file."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from pydantic import Field, model_validator

from sdxl_core.config.train.captions import CaptionOptions
from sdxl_core.config.train.data import DataOptions
from sdxl_core.config.train.memory import MemoryOptions
from sdxl_core.config.train.objective import ObjectiveOptions
from sdxl_core.config.train.optimizer import OptimizerOptions
from sdxl_core.config.train.run import RunOptions
from sdxl_core.config.train.saving import PreviewOptions, SavingOptions
from sdxl_core.roots import NamesFile


class TrainOptions(  # pydantic lists the fields of the last base first: so forms and help begin with RunOptions
    PreviewOptions,
    SavingOptions,
    CaptionOptions,
    DataOptions,
    ObjectiveOptions,
    MemoryOptions,
    OptimizerOptions,
    RunOptions,
):
    """Everything the trainer can be told, except paths."""

    @model_validator(mode="after")
    def cached_texts_are_frozen(self) -> TrainOptions:
        if self.cache_text_encoder_outputs and (self.learning_rate_te1 or self.learning_rate_te2):
            raise ValueError("cache_text_encoder_outputs: a text encoder that trains has no outputs to keep")
        changing = {
            "shuffle_caption": self.shuffle_caption,
            "caption_line": self.caption_line != "first",
            "enable_wildcard": self.enable_wildcard,
            "token_warmup_step": self.token_warmup_step,
            "caption_tag_dropout_rate": self.caption_tag_dropout_rate,
            "tag_dropout_by_category": self.tag_dropout_by_category,
        }
        found = [name for name, value in changing.items() if value]
        if self.cache_text_encoder_outputs and found:
            raise ValueError(f"cache_text_encoder_outputs: {' and '.join(found)} makes new captions each epoch")
        return self

    @model_validator(mode="after")
    def sharded_optimizers_are_elementwise(self) -> TrainOptions:
        if self.parallel == "fsdp" and self.optimizer not in ("adamw", "adamw8bit", "pagedadamw8bit", "lion8bit"):
            raise ValueError(
                f"parallel = 'fsdp' divides weights among processes; {self.optimizer} needs whole ones. Choose adamw, "
                f"adamw8bit, pagedadamw8bit or lion8bit, or parallel = 'ddp'"
            )
        return self


class TrainConfig(TrainOptions):
    """Fine-tune SDXL on cached latents and write a single-file checkpoint."""

    metadata: Path = Field(description="meta_lat.json of the latent cache")
    latents: Path = Field(description="folder of the cached .npz latents")
    out: Path = Field(description="folder that receives model/, state/, tensorboard/ and samples/")


class PlanConfig(TrainOptions):
    """The memory that a training run needs, by component, from its settings alone: nothing is loaded."""

    base_model: Annotated[str, NamesFile("tiny", "sdxl")] = Field(
        "sdxl", description="as the trainer's; what is not there yet counts as SDXL"
    )
    card_gb: float | None = Field(
        None, gt=0, title="Card (GiB)", description="refuse what does not fit a card of this size, and say what would"
    )
    width_px: int = Field(1024, ge=64, le=16384, multiple_of=8, description="of the largest bucket")
    height_px: int = Field(1024, ge=64, le=16384, multiple_of=8, description="of the largest bucket")
