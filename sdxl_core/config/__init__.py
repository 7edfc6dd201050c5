"""Every parameter, defined once: the TOML file, the command line and the browser form are all made from these models.

`…Options` hold what a stage can be told; `…Config` add the paths that a stage needs when it runs alone. In a job the
paths between stages follow from `out`, so `JobConfig` nests the options.
"""

from sdxl_core.config.job import JobConfig, JobSource
from sdxl_core.config.latents import (
    BucketOptions,
    CacheLatentsConfig,
    CompactLatentsConfig,
    ConvertLatentsConfig,
    Dtype,
    ImportLatentsConfig,
    LatentsOptions,
    PackTarsConfig,
    RemoveLatentsConfig,
    VerifyLatentsConfig,
)
from sdxl_core.config.merge import Category, CleanStep, MergeJsonConfig, MergeTagsConfig, MergeTagsOptions
from sdxl_core.config.notify import NotifyOptions, Occasion
from sdxl_core.config.subset import SourceOptions, StatisticsConfig, SubsetConfig, SubsetHow, SubsetOptions
from sdxl_core.config.train import PlanConfig, TrainConfig, TrainOptions

__all__ = [
    "BucketOptions",
    "CacheLatentsConfig",
    "Category",
    "CleanStep",
    "CompactLatentsConfig",
    "ConvertLatentsConfig",
    "Dtype",
    "ImportLatentsConfig",
    "JobConfig",
    "JobSource",
    "LatentsOptions",
    "MergeJsonConfig",
    "MergeTagsConfig",
    "MergeTagsOptions",
    "NotifyOptions",
    "Occasion",
    "PackTarsConfig",
    "PlanConfig",
    "RemoveLatentsConfig",
    "SourceOptions",
    "StatisticsConfig",
    "SubsetConfig",
    "SubsetHow",
    "SubsetOptions",
    "TrainConfig",
    "TrainOptions",
    "VerifyLatentsConfig",
]
