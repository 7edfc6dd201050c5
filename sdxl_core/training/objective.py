"""What a step minimises: the noise that was added to the latents, told from timestep and text (epsilon prediction).

Noise and timestep of a sample are keyed by (seed, epoch, sample), so neither order, process count nor resume changes
them. Schedule: SDXL's, betas `scaled_linear` 0.00085 to 0.012 in 1000 steps (arXiv:2307.01952).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from sdxl_core.training.randomness import torch_generator

NUM_TIMESTEPS = 1000
BETA_START, BETA_END = 0.00085, 0.012


@dataclass(frozen=True, slots=True, kw_only=True)
class NoiseDraw:
    """What is random about a batch. noise: float32 [B, 4, h, w].   timesteps: int64 [B] in [0, 1000)."""

    noise: Tensor
    timesteps: Tensor


def alphas_cumprod() -> Tensor:
    """The share of signal variance left at each timestep, float32 [1000], falling from 0.999 to 0.005."""
    betas = torch.linspace(BETA_START**0.5, BETA_END**0.5, NUM_TIMESTEPS, dtype=torch.float32) ** 2
    return torch.cumprod(1.0 - betas, dim=0)


def draw_noise(
    keys: Sequence[str], *, height: int, width: int, epoch: int, seed: int, noise_offset: float = 0.0
) -> NoiseDraw:
    """Noise and timesteps of the samples `keys` in `epoch`, on the CPU. `height`, `width`: of the latents.

    `noise_offset` adds that much of one normal value a sample and channel (crosslabs.org, "diffusion with offset
    noise"), as sd-scripts' option of that name.
    """
    noises, timesteps = [], []
    for key in keys:
        generator = torch_generator("noise", seed, epoch, key)
        timesteps.append(torch.randint(0, NUM_TIMESTEPS, (1,), generator=generator))
        noise = torch.randn((4, height, width), generator=generator)
        if noise_offset:
            noise += noise_offset * torch.randn((4, 1, 1), generator=generator)
        noises.append(noise)
    return NoiseDraw(noise=torch.stack(noises), timesteps=torch.cat(timesteps))


def add_noise(latents: Tensor, draw: NoiseDraw, alphas: Tensor) -> Tensor:
    """sqrt(a) * latents + sqrt(1 - a) * noise. latents: float32 [B, 4, h, w], already times the scaling factor.

    alphas: `alphas_cumprod()` on the latents' device. Returns float32 [B, 4, h, w].
    Source: arXiv:2006.11239 eq. 4; equal to diffusers' DDPMScheduler.add_noise (tests/training).
    """
    alpha = alphas[draw.timesteps].view(-1, 1, 1, 1)
    return alpha.sqrt() * latents + (1.0 - alpha).sqrt() * draw.noise


def min_snr_weights(alphas: Tensor, timesteps: Tensor, *, snr_gamma: float) -> Tensor:
    """Weight min(SNR, snr_gamma) / SNR of each sample, float32 [B] in (0, 1], for epsilon prediction.

    Source: arXiv:2303.09556 sec. 3.4.
    """
    snr = alphas[timesteps] / (1.0 - alphas[timesteps])
    return snr.clamp(max=snr_gamma) / snr


def sample_losses(prediction: Tensor, draw: NoiseDraw, alphas: Tensor, *, min_snr_gamma: float | None = None) -> Tensor:
    """Mean squared error of each sample's predicted noise, weighted, in float32. Returns [B], with gradient."""
    losses = (prediction.float() - draw.noise.float()).square().mean(dim=(1, 2, 3))
    if min_snr_gamma is None:
        return losses
    return losses * min_snr_weights(alphas, draw.timesteps, snr_gamma=min_snr_gamma)
