"""Parameters of the latent cache."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from sdxl_core.roots import NamesFile, data_roots
from sdxl_core.sections import Section, WeightsName

Dtype = Literal["float32", "float16", "bfloat16"]
VAE_HELP = (
    "single-file .safetensors (a whole checkpoint, or a VAE in LDM or diffusers keys), a diffusers folder, or 'tiny' "
    "(a small random VAE for trying things out)"
)


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
    vae: Annotated[str, NamesFile("tiny", "")] = Field(
        "", title="VAE", description=f"{VAE_HELP}; empty: the VAE in train.base_model"
    )
    dtype: Dtype = Field("float32", description="precision the VAE computes in")
    layout: Literal["per_image", "packed"] = Field(
        "per_image",
        description="per_image: one .npz a picture in float32, as sd-scripts' trainers read them; packed: one .npz a "
        "bucket and commit group, thousands of files instead of millions",
    )
    packed_dtype: Literal["float16", "float32"] = Field("float16", description="packed: precision latents are kept in")
    npz_naming: Literal["stem", "size"] = Field(
        "stem",
        description="per_image: F.npz, as sd-scripts' fine-tuning has it, or F_0832x1216_sdxl.npz (width and height of "
        "the picture), as its trainers' own cache has it",
    )
    batch_size: int = Field(
        4, ge=0, le=256, description="pictures a VAE batch; 0: found by trying when an output is begun, then kept"
    )
    compile: bool = Field(
        False, description="torch.compile the VAE for full batches of each bucket: minutes once, then quicker (CUDA)"
    )
    shard_size: int = Field(4096, ge=1, le=1_000_000, description="pictures a shard: the unit of retry and resume")
    commit_size: int = Field(
        512, ge=1, le=100_000, description="pictures synced to disk at once; lost at most in a crash"
    )
    compat: Literal["default", "sd-scripts"] = Field(
        "default",
        description="default: EXIF orientation honoured, alpha composited, ICC converted to sRGB; "
        "sd-scripts: its pixels exactly (EXIF and ICC ignored, alpha dropped)",
    )
    background: str = Field(
        "#ffffff", pattern=r"^#[0-9a-fA-F]{6}$", description="colour behind transparent pictures (compat = default)"
    )
    flip_aug: bool = Field(False, description="keep latents of the mirrored picture too, as sd-scripts' flip_aug")
    alpha_mask: bool = Field(False, description="keep each picture's transparency as a mask, as sd-scripts' alpha_mask")
    logvar: bool = Field(
        False,
        description="keep the posterior's mean and variance, not one sample; for our trainer only",
    )
    min_side_px: int = Field(32, ge=1, description="pictures with a shorter side are rejected as too_small")
    max_image_megapixels: int = Field(200, ge=1, le=4000, description="larger pictures are rejected unopened")
    max_cropped_share: float = Field(
        0.75, ge=0, le=1, description="pictures that lose more than this share of their area to the crop are rejected"
    )
    seed: int = Field(0, ge=0, lt=2**63, description="seed of the posterior sample, together with the picture's digest")
    devices: str = Field(
        "auto",
        description="auto (every CUDA card, else one CPU slot), or a list such as 0,1 or cpu,cpu: one process each, "
        "started again when it dies; cpu alone: within the process that is running. engine = ray: auto (every GPU of "
        "the cluster, else one CPU slot a machine), or a list such as gpu,gpu or cpu,cpu",
    )
    engine: Literal["processes", "ray"] = Field(
        "processes",
        description="processes: the devices of this machine; ray: those of a Ray cluster, one GPU a shard "
        "(pip install 'sdxl-flows[ray]'; docs/cluster.md)",
    )
    ray_address: str = Field(
        "local",
        min_length=1,
        description="engine = ray: local (a Ray of its own on this machine, ended with the run), auto (the cluster "
        "that this machine belongs to), or its head as HOST:PORT",
    )
    decode_threads: int = Field(
        0, ge=0, le=256, description="threads a device that decode and resize pictures; 0: all cores, shared by devices"
    )
    root_map: dict[str, str] = Field(
        {}, description='replace the beginning of metadata keys: {"H:/just_astolfo" = "/data/just_astolfo"}'
    )
    only_shards: tuple[Annotated[int, Field(ge=0)], ...] = Field(
        (),
        title="Only shards",
        description="numbers of shards, as a run's list of failed shards has them: only these are looked at and "
        "encoded, the others stay as they are; empty: all",
    )

    @model_validator(mode="after")
    def known_cluster(self) -> LatentsOptions:
        if self.ray_address not in ("local", "auto") and data_roots():
            raise ValueError(
                f"ray_address = {self.ray_address}: what a cluster answers can run as code here, so where data roots "
                f"are set only whoever runs the service names it (RAY_ADDRESS); write auto"
            )
        return self

    @model_validator(mode="after")
    def one_posterior(self) -> LatentsOptions:
        if self.logvar and self.flip_aug:
            raise ValueError("logvar and flip_aug exclude each other: the mirrored picture has a posterior of its own")
        return self


class CacheLatentsConfig(LatentsOptions):
    """Encode every picture of a metadata JSON with the VAE into bucketed .npz latents, resumable at any moment."""

    source: Path = Field(
        description="folder of the pictures, or a catalog: then they are read where they are, in tars too"
    )
    manifest: Path | None = Field(None, description="the pictures of this manifest, as subset makes it")
    metadata: Path = Field(description="metadata JSON whose keys name the pictures")
    out: Path = Field(description="folder that receives latents/, meta_lat.json and rejected.jsonl")
    vae: WeightsName = Field(min_length=1, title="VAE", description=VAE_HELP)

    def of_all_shards(self) -> Self:
        """The same without `only_shards`: what the whole set is made with."""
        return self.model_copy(update={"only_shards": ()})


class VerifyLatentsConfig(Section):
    """Read every byte of a latent set and hold it against what was written: CRC, shape, finite values, settings."""

    path: Path = Field(description="out folder of cache-latents, or the latents folder in it")
    repair: bool = Field(False, description="encode what is bad again, and nothing else; else its list is left")
    threads: int = Field(0, ge=0, le=256, description="files read at once; 0: two a processor")


class RemoveLatentsConfig(Section):
    """Take the latents of some pictures out of a latent set."""

    path: Path = Field(description="out folder of cache-latents, or the latents folder in it")
    keys: list[str] = Field([], description="key of a picture, as in the metadata JSON; may be given repeatedly")
    keys_file: Path | None = Field(None, description="text file with a key a line")

    @model_validator(mode="after")
    def names_keys(self) -> RemoveLatentsConfig:
        if not self.keys and self.keys_file is None:
            raise ValueError("name the pictures: keys, or keys_file with a key a line")
        return self


class ConvertLatentsConfig(Section):
    """Bring a latent set into another layout, into a new folder; nothing is encoded again."""

    path: Path = Field(description="out folder of cache-latents or import-latents, or the latents folder in it")
    out: Path = Field(description="folder that receives latents/ and meta_lat.json; continued where it was stopped")
    layout: Literal["per_image", "packed"] = Field(
        description="per_image: one .npz a picture in float32, as sd-scripts' trainers read them; packed: one .npz a "
        "bucket and commit group"
    )
    packed_dtype: Literal["source", "float16", "float32"] = Field(
        "source",
        description="packed: precision latents are kept in; source: what they have, nothing is lost; float16 keeps "
        "about three digits of float32",
    )
    npz_naming: Literal["stem", "size"] = Field(
        "stem", description="per_image: F.npz, or F_0832x1216_sdxl.npz with the picture's size"
    )


class ImportLatentsConfig(Section):
    """Take an sd-scripts cache over where it lies: every file is read and checked, none is changed or moved."""

    path: Path = Field(description="folder with the .npz files, F.npz or F_0832x1216_sdxl.npz, flat or nested")
    metadata: Path | None = Field(
        None, description="metadata JSON with tags and captions whose keys name the files; without it every file counts"
    )
    commit_size: int = Field(4096, ge=1, le=100_000, description="files recorded at once; checked again after a crash")
    shard_size: int = Field(65_536, ge=1, le=1_000_000, description="files a ledger")
    threads: int = Field(0, ge=0, le=256, description="files read at once; 0: two a processor")


class PackTarsConfig(Section):
    """Put a set's per-image files into tars with a JSON index each, as large collections are shared."""

    path: Path = Field(description="folder with the .npz files, or the out folder of cache-latents")
    out: Path = Field(description="folder that receives 0000.tar, 0000.json, …")
    num_tars: int = Field(
        1000, ge=1, le=100_000, description="a picture called by a number goes into tar number modulo num_tars"
    )


class CompactLatentsConfig(Section):
    """Merge the small files of a packed set, and drop the rows that were removed or encoded again."""

    path: Path = Field(description="out folder of cache-latents, or the latents folder in it")
    file_mb: int = Field(256, ge=1, le=2000, description="no merged file is larger than this many megabytes")
