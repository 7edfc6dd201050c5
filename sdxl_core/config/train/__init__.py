"""Parameters of the trainer: one file a topic, one flat section in a job file."""

from __future__ import annotations

from pathlib import Path

from pydantic import Field

from sdxl_core.config.train.captions import CaptionOptions
from sdxl_core.config.train.data import DataOptions
from sdxl_core.config.train.memory import MemoryOptions
from sdxl_core.config.train.objective import ObjectiveOptions
from sdxl_core.config.train.optimizer import OptimizerOptions
from sdxl_core.config.train.run import RunOptions
from sdxl_core.config.train.saving import PreviewOptions, SavingOptions


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


class TrainConfig(TrainOptions):
    """Fine-tune SDXL on cached latents and write a single-file checkpoint."""

    metadata: Path = Field(description="meta_lat.json of the latent cache")
    latents: Path = Field(description="folder of the cached .npz latents")
    out: Path = Field(description="folder that receives model/, state/, tensorboard/ and samples/")
