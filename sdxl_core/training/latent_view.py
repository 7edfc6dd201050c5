"""How an epoch sees a sample's latents: as they are or mirrored, and drawn anew where the whole posterior was kept."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from sdxl_core.errors import DataError
from sdxl_core.latents import LatentRecord
from sdxl_core.training.randomness import torch_generator, uniform

LOGVAR_MIN, LOGVAR_MAX = -30.0, 20.0  # as diffusers' DiagonalGaussianDistribution clamps it


@dataclass(frozen=True, slots=True, kw_only=True)
class LatentView:
    """latents: float32 [4, h, w], unscaled.   alpha_mask: float32 [H, W] in [0, 1], in pixels of the bucket; None where

    the cache holds none.   crop_top_px, crop_left_px: of the crop as it conditions, mirrored with it.
    """

    latents: Tensor
    alpha_mask: Tensor | None
    original_width_px: int
    original_height_px: int
    crop_top_px: int
    crop_left_px: int


def view_of(record: LatentRecord, *, key: str, epoch: int, seed: int, flip_aug: bool) -> LatentView:
    """A pure function of its arguments: the coin and the noise are those of (seed, epoch, key).

    A mirrored picture is cropped from the right: left = width - right, as sd-scripts has it (reference 4.3).
    Raises: DataError: `flip_aug`, but the cache holds no mirrored latents.
    """
    is_flipped = flip_aug and uniform("flip", seed, epoch, key) < 0.5
    if flip_aug and record.latents_flipped is None:
        raise DataError(
            f"flip_aug: the cache holds no mirrored latents of {key!r}. Run cache-latents with flip_aug into another "
            f"folder, or train without it."
        )
    source = record.latents_flipped if is_flipped and record.latents_flipped is not None else record.latents
    latents = torch.from_numpy(source.astype(np.float32))
    if record.logvar is not None:
        logvar = torch.from_numpy(record.logvar.astype(np.float32)).clamp(LOGVAR_MIN, LOGVAR_MAX)
        spread = (0.5 * (logvar.flip(-1) if is_flipped else logvar)).exp()
        noise = torch.randn(latents.shape, generator=torch_generator("posterior", seed, epoch, key))
        latents = latents + spread * noise
    mask = None
    if record.alpha_mask is not None:
        pixels = torch.from_numpy(record.alpha_mask.astype(np.float32)) / 255
        mask = pixels.flip(-1) if is_flipped else pixels
    left, top, right, _ = record.crop_ltrb
    return LatentView(
        latents=latents,
        alpha_mask=mask,
        original_width_px=record.original_width_px,
        original_height_px=record.original_height_px,
        crop_top_px=int(top),
        crop_left_px=int(record.bucket[0] - right) if is_flipped else int(left),
    )
