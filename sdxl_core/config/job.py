"""Parameters of a whole job: the stages' options, and the paths between them that follow from `out`."""

from __future__ import annotations

from pathlib import Path
from typing import Self

from pydantic import Field, model_validator

from sdxl_core.config.latents import CacheLatentsConfig, LatentsOptions
from sdxl_core.config.merge import MergeTagsConfig, MergeTagsOptions
from sdxl_core.config.notify import NotifyOptions
from sdxl_core.config.subset import SourceOptions, SubsetConfig, SubsetOptions
from sdxl_core.config.train import TrainConfig, TrainOptions
from sdxl_core.refs import SubsetRef
from sdxl_core.sections import Section


class JobSource(SourceOptions):
    path: Path = Field(description="folder of pictures with text files beside them, or a catalog")


class JobConfig(Section):
    """The whole path: pictures and tags in, fine-tuned SDXL checkpoint out."""

    out: Path = Field(description="folder that receives everything the job makes")
    source: JobSource = Field(description="the pictures")
    subset: SubsetOptions = Field(SubsetOptions(), description="which pictures")
    merge: MergeTagsOptions = Field(MergeTagsOptions(), description="tags and captions into one JSON")
    latents: LatentsOptions = Field(LatentsOptions(), description="the latent cache")
    train: TrainOptions = Field(TrainOptions(), description="fine-tuning")
    notify: NotifyOptions = Field(NotifyOptions(), description="who is told how the run ended")

    @model_validator(mode="after")
    def one_kind_of_weights(self) -> Self:
        if self.latents.vae == "tiny" and self.train.base_model != "tiny":
            raise ValueError(
                f"latents.vae = 'tiny' has random weights, and train.base_model = {self.train.base_model!r} would be "
                f"trained on them: leave latents.vae out (the VAE in the base model), or name another VAE"
            )
        return self

    def subset_config(self) -> SubsetConfig:
        how = "manifest" if self.subset.how == "auto" else self.subset.how
        return SubsetConfig(
            **self.subset.model_dump() | {"how": how},
            **self.source.model_dump(exclude={"path"}),
            source=self.source.path,
            out=self.out / "subset",
        )

    def merge_config(self, picked: SubsetRef | None) -> MergeTagsConfig:
        """Args: picked: the subset stage's result, None where it was not run."""
        is_listed = picked is not None and picked.how == "manifest"
        return MergeTagsConfig(
            **self.merge.model_dump(),
            **self.source.model_dump(exclude={"path"}),
            source=self.source.path if picked is None else picked.catalog if is_listed else picked.path,
            manifest=picked.path / "manifest.arrow" if picked is not None and is_listed else None,
            out=self.out / "meta_cap_dd.json",
        )

    def latents_config(self, picked: SubsetRef | None) -> CacheLatentsConfig:
        """Args: picked: as in `merge_config`. The pictures of a manifest are read where they are, in tars too."""
        is_listed = picked is not None and picked.how == "manifest"
        return CacheLatentsConfig(
            **self.latents.model_dump() | {"vae": self.latents.vae or self.train.base_model},
            source=self.source.path if picked is None else picked.catalog if is_listed else picked.path,
            manifest=picked.path / "manifest.arrow" if picked is not None and is_listed else None,
            metadata=self.out / "meta_cap_dd.json",
            out=self.out,
        )

    def train_config(self) -> TrainConfig:
        return TrainConfig(
            **self.train.model_dump(),
            metadata=self.out / "meta_lat.json",
            latents=self.out / "latents",
            out=self.out,
        )
