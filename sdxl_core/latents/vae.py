"""Pixels to latents: one batch through the VAE, checked, with noise that belongs to the picture."""

from __future__ import annotations

import hashlib
from functools import cache
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from sdxl_core.models.load import load_vae

DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


class Encoder:
    """A VAE on one device. `encode` gives float32 latents [B, 4, h/8, w/8]: a sample of the posterior, unscaled."""

    def __init__(self, vae: str, *, dtype: str, device: str) -> None:
        self._name, self._dtype = vae, dtype
        self._device = torch.device("cpu" if device == "cpu" else "cuda:0")

    def encode(self, pixels: NDArray[np.uint8], digests: list[bytes], *, seed: int) -> tuple[Tensor, list[str]]:
        """Encode one batch.

        Args:   pixels: uint8 [B, h, w, 3].   digests: SHA-256 of each picture's file; with `seed` they key the noise.
        Returns: latents; rows may be non-finite only if they are so in float32 too. And notes: `float32` where half
                precision overflowed and the batch was done again, `halved` where memory ran out.
        """
        height, width = pixels.shape[1] // 8, pixels.shape[2] // 8
        noise = torch.stack([posterior_noise(digest, seed, height, width) for digest in digests])
        try:
            latents = self._sample(pixels, noise, self._dtype)
        except torch.OutOfMemoryError:
            if len(pixels) == 1:
                raise
            half = len(pixels) // 2
            first, notes = self.encode(pixels[:half], digests[:half], seed=seed)
            second, more = self.encode(pixels[half:], digests[half:], seed=seed)
            return torch.cat([first, second]), ["halved", *notes, *more]
        if self._dtype != "float32" and not torch.isfinite(latents).all():
            return self._sample(pixels, noise, "float32"), ["float32"]
        return latents, []

    @torch.inference_mode()
    def _sample(self, pixels: NDArray[np.uint8], noise: Tensor, dtype: str) -> Tensor:
        vae = _load(self._name, dtype, str(self._device))
        images = torch.from_numpy(pixels).permute(0, 3, 1, 2).to(self._device).float().div_(255).sub_(0.5).div_(0.5)
        images = images.to(DTYPES[dtype], memory_format=torch.channels_last)
        posterior = vae.encode(images).latent_dist
        latents: Tensor = posterior.mean.float() + posterior.std.float() * noise.to(self._device)
        return latents.cpu()


@cache
def _load(vae: str, dtype: str, device: str) -> Any:
    """The VAE, once a process: shards that follow find it loaded."""
    return load_vae(vae, dtype=DTYPES[dtype]).to(device).to(memory_format=torch.channels_last)


def posterior_noise(digest: bytes, seed: int, height: int, width: int) -> Tensor:
    """Standard normal float32 [4, height, width]: a function of picture and seed, on any device, in any order."""
    key = hashlib.sha256(seed.to_bytes(8, "little") + digest).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(key[:8], "little") >> 1)
    return torch.randn((4, height, width), generator=generator)
