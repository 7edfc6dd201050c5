"""Every parameter, defined once: the TOML file, the command line and the browser form are all made from these models.

`…Options` hold what a stage can be told; `…Config` add the paths that a stage needs when it runs alone. In a job the
paths between stages follow from `out`, so `JobConfig` nests the options.
"""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from pydantic import Field, field_validator, model_validator

from sdxl_core.refs import SubsetRef
from sdxl_core.sections import Extension, Section

CleanStep = Literal["underscores", "repeated", "rating"]
Category = Literal[
    "artist", "character", "copyright", "general", "meta", "species", "lore", "quality", "special", "year", "rating"
]
SubsetHow = Literal["auto", "manifest", "copy", "hardlink", "reflink", "symlink"]
Dtype = Literal["float32", "float16", "bfloat16"]


class SourceOptions(Section):
    recursive: bool = Field(True, description="look into sub-folders too")
    tag_extension: Extension = Field(".txt", description="tags of picture F.png are in F + this extension")
    caption_extension: Extension = Field(".caption", description="sentences about F.png are in F + this extension")


class SubsetOptions(Section):
    query: str = Field(
        "",
        title="Tag query",
        description="as booru sites write it: 1girl -comic rating:g,s score:>=10 ( pink_hair or blonde_hair ) *_ears; "
        "empty keeps every picture (docs/query.md)",
    )
    how: SubsetHow = Field(
        "auto",
        description="auto: manifest in a job, copy otherwise; manifest: a list that says where each picture is, "
        "nothing is copied; copy: files of their own, verified; hardlink: second names on the same file system; "
        "reflink: files that share blocks (btrfs, xfs); symlink: links that need the source to stay",
    )


class SubsetConfig(SubsetOptions, SourceOptions):
    """Pick pictures by their tags and list, copy or link them, with their text files, in a new folder."""

    source: Path = Field(description="folder of pictures with text files beside them, or a catalog")
    out: Path = Field(description="folder that receives the subset")


class StatisticsConfig(Section):
    """Count the tags, sizes, ratings and caption lengths of the pictures that a query picks of a catalog."""

    source: Path = Field(description="a catalog")
    query: str = Field("", title="Tag query", description="which pictures; empty: all (docs/query.md)")
    out: Path = Field(description="folder that receives statistics.html and statistics.md")


class MergeTagsOptions(Section):
    clean: tuple[CleanStep, ...] = Field(
        (),
        description="what is changed in the tags: underscores (spaces instead, but ^_^ stays), repeated (each tag "
        "once), rating (a trailing rating is left out, with all behind it)",
    )
    category_order: tuple[Category, ...] = Field(
        ("artist", "character", "copyright", "general", "meta"),
        description="catalog: tags are written in this order of their categories; those not named follow",
    )
    drop_categories: tuple[Category, ...] = Field((), description="catalog: tags of these categories are left out")
    separator: str = Field(", ", min_length=1, description="catalog: what stands between two tags")
    key_style: Literal["relative", "full_path"] = Field(
        "relative",
        description="relative: path below the source without extension (the stem, in a flat folder); "
        "full_path: the path as given, as sd-scripts' --full_path writes it",
    )
    empty_tags: Literal["keep", "reject"] = Field(
        "keep", description="a picture whose text files are empty: keep it with an empty caption, or reject it"
    )
    num_shards: int = Field(8, ge=1, le=10_000, description="the folder is read in this many parallel shards")


class MergeTagsConfig(MergeTagsOptions, SourceOptions):
    """Collect the tags and captions of a folder of pictures into one metadata JSON (meta_cap_dd.json)."""

    source: Path = Field(description="folder of pictures with text files beside them, or a catalog")
    manifest: Path | None = Field(None, description="catalog: only the pictures of this manifest, as subset makes it")
    out: Path = Field(description="metadata JSON to write; rejected.jsonl is written beside it")


class MergeJsonConfig(Section):
    """Join metadata JSONs, such as the shards of a meta_lat.json, into one."""

    sources: tuple[Path, ...] = Field(
        min_length=1, description="metadata JSONs, in order; of two entries with one key the first is used"
    )
    out: Path = Field(description="metadata JSON to write; rejected.jsonl is written beside it")


class BucketOptions(Section):
    resolution_px: int = Field(1024, ge=64, le=8192, description="buckets have at most resolution_px squared pixels")
    min_bucket_px: int = Field(256, ge=8, le=8192, description="shortest side of a bucket")
    max_bucket_px: int = Field(
        2048, ge=8, le=16384, description="longest side of a bucket; sd-scripts' default 1024 costs wide pictures area"
    )
    bucket_step_px: int = Field(64, ge=8, le=1024, multiple_of=8, description="sides are multiples of this")
    no_upscale: bool = Field(False, description="never enlarge: one bucket a size, as sd-scripts' bucket_no_upscale")

    @model_validator(mode="after")
    def sides_fit(self) -> BucketOptions:
        if not self.min_bucket_px <= self.resolution_px <= self.max_bucket_px:
            raise ValueError(
                f"min_bucket_px {self.min_bucket_px} <= resolution_px {self.resolution_px} <= "
                f"max_bucket_px {self.max_bucket_px} must hold"
            )
        if self.bucket_step_px > self.resolution_px:
            raise ValueError(f"bucket_step_px {self.bucket_step_px} is larger than resolution_px {self.resolution_px}")
        return self


class LatentsOptions(BucketOptions):
    vae: str = Field(
        "tiny",
        title="VAE",
        description="single-file .safetensors (a whole checkpoint, or a VAE in LDM or diffusers keys), a diffusers "
        "folder, or 'tiny' (a small random VAE for trying things out)",
    )
    dtype: Dtype = Field("float32", description="precision the VAE computes in; the .npz always holds float32")
    batch_size: int = Field(4, ge=1, le=256, description="pictures a VAE batch")
    shard_size: int = Field(4096, ge=1, le=1_000_000, description="pictures a shard: the unit of retry and resume")
    commit_size: int = Field(
        256, ge=1, le=100_000, description="pictures synced to disk at once; lost at most in a crash"
    )
    compat: Literal["default", "sd-scripts"] = Field(
        "default",
        description="default: EXIF orientation honoured, alpha composited, ICC converted to sRGB; "
        "sd-scripts: its pixels exactly (EXIF and ICC ignored, alpha dropped)",
    )
    background: str = Field(
        "#ffffff", pattern=r"^#[0-9a-fA-F]{6}$", description="colour behind transparent pictures (compat = default)"
    )
    min_side_px: int = Field(32, ge=1, description="pictures with a shorter side are rejected as too_small")
    max_image_megapixels: int = Field(200, ge=1, le=4000, description="larger pictures are rejected unopened")
    max_cropped_share: float = Field(
        0.75, ge=0, le=1, description="pictures that lose more than this share of their area to the crop are rejected"
    )
    seed: int = Field(0, ge=0, lt=2**63, description="seed of the posterior sample, together with the picture's digest")
    devices: str = Field(
        "auto",
        description="auto (every CUDA card, else one CPU slot), or a list such as 0,1 or cpu,cpu: one process each",
    )
    decode_threads: int = Field(2, ge=1, le=256, description="threads a device that decode and resize pictures")
    root_map: dict[str, str] = Field(
        {}, description='replace the beginning of metadata keys: {"H:/just_astolfo" = "/data/just_astolfo"}'
    )


class CacheLatentsConfig(LatentsOptions):
    """Encode every picture of a metadata JSON with the VAE into bucketed .npz latents, resumable at any moment."""

    source: Path = Field(description="folder of the pictures")
    metadata: Path = Field(description="metadata JSON whose keys name the pictures")
    out: Path = Field(description="folder that receives latents/, meta_lat.json and rejected.jsonl")


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


class JobSource(SourceOptions):
    path: Path = Field(description="folder of pictures with text files beside them")


class JobConfig(Section):
    """The whole path: pictures and tags in, fine-tuned SDXL checkpoint out."""

    out: Path = Field(description="folder that receives everything the job makes")
    source: JobSource = Field(description="the pictures")
    subset: SubsetOptions = Field(SubsetOptions(), description="which pictures")
    merge: MergeTagsOptions = Field(MergeTagsOptions(), description="tags and captions into one JSON")
    latents: LatentsOptions = Field(LatentsOptions(), description="the latent cache")
    train: TrainOptions = Field(TrainOptions(), description="fine-tuning")

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
        """Args: picked: as in `merge_config`. A manifest leaves the pictures where they are."""
        source = self.source.path if picked is None or picked.how == "manifest" else picked.path
        return CacheLatentsConfig(
            **self.latents.model_dump(), source=source, metadata=self.out / "meta_cap_dd.json", out=self.out
        )

    def train_config(self) -> TrainConfig:
        return TrainConfig(
            **self.train.model_dump(),
            metadata=self.out / "meta_lat.json",
            latents=self.out / "latents",
            out=self.out,
        )
