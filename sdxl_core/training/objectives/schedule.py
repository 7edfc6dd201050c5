"""How much of the picture is left at each timestep. SDXL's betas: `scaled_linear` 0.00085 to 0.012 in 1000 steps.

Source: SDXL paper arXiv:2307.01952; equal to diffusers' DDPMScheduler (tests/training).
"""

from __future__ import annotations

import torch
from torch import Tensor

NUM_TIMESTEPS = 1000
BETA_START, BETA_END = 0.00085, 0.012
MAX_SNR = 1000.0  # above, SNR counts as this much in scale_v, v-like and debiased weights, as sd-scripts clamps it


def alphas_cumprod(*, zero_terminal_snr: bool = False) -> Tensor:
    """The share of signal variance left at each timestep, float32 [1000], falling from 0.999 to 0.005, or to 0.

    `zero_terminal_snr`: sqrt(alphas_cumprod) is shifted and scaled so that the last is 0 and the first stays
    (arXiv:2305.08891, algorithm 1).
    """
    betas = torch.linspace(BETA_START**0.5, BETA_END**0.5, NUM_TIMESTEPS, dtype=torch.float32) ** 2
    alphas = torch.cumprod(1.0 - betas, dim=0)
    if not zero_terminal_snr:
        return alphas
    roots = alphas.sqrt()
    first, last = roots[0].clone(), roots[-1].clone()
    return ((roots - last) * (first / (first - last))) ** 2


def snr_of(alphas: Tensor, timesteps: Tensor) -> Tensor:
    """Signal-to-noise ratio a / (1 - a) at each timestep, float32 [B]; 0 at a zero-SNR end."""
    return alphas[timesteps] / (1.0 - alphas[timesteps])
