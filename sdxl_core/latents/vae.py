"""The VAE's encoder on one device, and the noise that belongs to a picture."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import Tensor

from sdxl_core.models.load import load_vae

DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
MAX_SHAPES = 256  # that are compiled for; torch gives up after 8 unless told otherwise
FLIPPED = b"/flipped"  # added to a picture's digest, it keys the noise of the mirrored picture

# uint8 [B, h, w, 3] to the posterior's mean and logarithm of variance, each [B, 4, h / 8, w / 8] in any precision.
EncodeFunction = Callable[[Tensor], tuple[Tensor, Tensor]]
# (vae, dtype, device) to a function that computes there.
LoadFunction = Callable[[str, str, torch.device], EncodeFunction]


@cache
def load_encoder(vae: str, dtype: str, device: torch.device) -> EncodeFunction:
    """The VAE of a name (models.load.load_vae), once a process: shards that follow find it loaded.

    Raises: ConfigError, CheckpointError.
    """
    module: Any = load_vae(vae, dtype=DTYPES[dtype]).to(device).to(memory_format=torch.channels_last)

    def encode(pixels: Tensor) -> tuple[Tensor, Tensor]:
        images = pixels.permute(0, 3, 1, 2).float().div_(255).sub_(0.5).div_(0.5)
        posterior = module.encode(images.to(DTYPES[dtype], memory_format=torch.channels_last)).latent_dist
        return posterior.mean, posterior.logvar

    return encode


@cache
def compiled(encode: EncodeFunction) -> EncodeFunction:
    """The encoder compiled anew for each shape it meets, which takes minutes each and is kept for the process."""
    import torch._dynamo

    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, MAX_SHAPES)
    return torch.compile(encode, dynamic=False)


def posterior_noise(digest: bytes, seed: int, height: int, width: int) -> Tensor:
    """Standard normal float32 [4, height, width]: a function of picture and seed, on any device, in any order."""
    key = hashlib.sha256(seed.to_bytes(8, "little") + digest).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(key[:8], "little") >> 1)
    return torch.randn((4, height, width), generator=generator)
