"""From files to synced `.npz` files: by the engine, and by the loop that people ran."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path

import torch

from benchmarks.rival_loop import rival_loop
from sdxl_core.buckets import BucketTable
from sdxl_core.catalog.images import ImagePlace
from sdxl_core.config import CacheLatentsConfig
from sdxl_core.files import sync_files
from sdxl_core.latents.engine import EncodedGroup, EncodedPicture, Engine, EngineReport, Picture
from sdxl_core.latents.formats import write_per_image
from sdxl_core.latents.vae import EncodeFunction, LoadFunction


def engine_run(config: CacheLatentsConfig, paths: list[Path], device: str, load: LoadFunction) -> EngineReport:
    """As the cache does it: each batch written when it is encoded, each commit group synced."""
    pictures = [Picture(p.stem, ImagePlace(p, p.name, 0, p.stat().st_size, False)) for p in paths]
    size = config.commit_size
    groups = [(n, pictures[s : s + size]) for n, s in enumerate(range(0, len(pictures), size))]

    def path(item: EncodedPicture) -> Path:
        return config.out / f"{item.picture.key}.npz"

    def write(number: int, batch: Sequence[EncodedPicture]) -> None:
        for item in batch:
            write_per_image(path(item), item.record)

    def commit(group: EncodedGroup) -> None:
        sync_files(path(item) for item in group.pictures)

    return Engine(config, device, load=load).run(groups, commit, write)


def loop_rate(config: CacheLatentsConfig, paths: list[Path], encode: EncodeFunction, device: torch.device) -> float:
    """Pictures a second of the loop."""

    def sample(pixels: torch.Tensor) -> torch.Tensor:
        with torch.inference_mode():
            mean, logvar = encode(pixels.to(device))
            return mean + torch.exp(logvar / 2) * torch.randn_like(mean)

    started = time.perf_counter()
    rival_loop(paths, BucketTable.from_options(config), sample, config.out)
    return len(paths) / (time.perf_counter() - started)
