"""Noise and timesteps of a sample in an epoch: keyed by (seed, epoch, sample), so neither order, process count nor

resume changes them. Every option draws from a stream of its own: switching one on changes no other number.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import interpolate

from sdxl_core.config.train.objective import ObjectiveOptions
from sdxl_core.training.objectives.schedule import NUM_TIMESTEPS
from sdxl_core.training.randomness import torch_generator, uniform


@dataclass(frozen=True, slots=True, kw_only=True)
class NoiseDraw:
    """What is random about a batch.

    noise:        float32 [B, 4, h, w]: what the target is made of.
    timesteps:    int64 [B] in [0, 1000); of rectified flow float32 [B] in (0, 1000): 1000 times the share of noise.
    perturbation: float32 [B, 4, h, w] that the input has on top of `noise`, and the target has not; or None.
    """

    noise: Tensor
    timesteps: Tensor
    perturbation: Tensor | None = None

    def to(self, device: torch.device | str) -> NoiseDraw:
        """The same draw on a device."""
        perturbation = None if self.perturbation is None else self.perturbation.to(device)
        return NoiseDraw(
            noise=self.noise.to(device), timesteps=self.timesteps.to(device), perturbation=perturbation
        )  # fmt: skip


def draw_noise(
    keys: Sequence[str], latents: Tensor, *, epoch: int, seed: int, options: ObjectiveOptions | None = None
) -> NoiseDraw:
    """Noise and timesteps of the samples `keys` in `epoch`, on the CPU.

    latents: [B, 4, h, w] of the same samples, times the scaling factor; only adaptive noise offset looks at values.
    """
    options = options or ObjectiveOptions()
    draws = [
        _draw(key, sample, epoch=epoch, seed=seed, options=options)
        for key, sample in zip(keys, latents, strict=True)
    ]  # fmt: skip
    return NoiseDraw(
        noise=torch.stack([noise for noise, _, _ in draws]),
        timesteps=torch.cat([timestep for _, timestep, _ in draws]),
        perturbation=torch.stack([extra for _, _, extra in draws]) if options.ip_noise_gamma else None,
    )


def fixed_draw(
    key: str, shape: Sequence[int], *, timesteps: tuple[int, int], seed: int, is_flow: bool = False
) -> NoiseDraw:
    """Plain noise [4, h, w] and a timestep in [low, high), [], of one sample: the same whenever it is asked for."""
    low, high = timesteps
    share = uniform("held out timestep", seed, key, low, high)
    timestep = max(low + share * (high - low), 0.01) if is_flow else int(low + share * (high - low))
    noise = torch.randn(tuple(shape), generator=torch_generator("held out noise", seed, key, low, high))
    return NoiseDraw(noise=noise, timesteps=torch.tensor(timestep))


def _draw(
    key: str, latents: Tensor, *, epoch: int, seed: int, options: ObjectiveOptions
) -> tuple[Tensor, Tensor, Tensor]:
    """(noise, timestep [1], perturbation) of one sample."""
    where = (seed, epoch, key)
    generator = torch_generator("noise", *where)
    timestep = torch.randint(options.min_timestep, options.max_timestep, (1,), generator=generator)
    noise = torch.randn(latents.shape, generator=generator)
    if options.noise_offset or options.adaptive_noise_scale:
        offsets = torch.randn((len(latents), 1, 1), generator=generator)
        noise += _offset_strength(latents, options, uniform("noise offset strength", *where)) * offsets
    if options.multires_noise_iterations:
        noise = multires_noise(noise, options, torch_generator("multires noise", *where))
    if options.prediction_type == "rectified_flow":
        timestep = NUM_TIMESTEPS * flow_sigma(options, torch_generator("flow", *where))
    extra = noise
    if options.ip_noise_gamma:
        strength = uniform("input perturbation strength", *where) if options.ip_noise_gamma_random_strength else 1.0
        extra = torch.randn(latents.shape, generator=torch_generator("input perturbation", *where))
        extra *= options.ip_noise_gamma * strength
    return noise, timestep, extra


def _offset_strength(latents: Tensor, options: ObjectiveOptions, chance: float) -> Tensor | float:
    """How far whole channels are shifted: a number, or with adaptive noise one a channel, float32 [4, 1, 1]."""
    strength = options.noise_offset * (chance if options.noise_offset_random_strength else 1.0)
    if not options.adaptive_noise_scale:
        return strength
    means = latents.float().mean(dim=(1, 2), keepdim=True).abs()
    return (strength + options.adaptive_noise_scale * means).clamp(min=0.0)


def multires_noise(noise: Tensor, options: ObjectiveOptions, generator: torch.Generator) -> Tensor:
    """`noise` [4, h, w] with coarser and coarser noise added to it, at unit variance again.

    Level i is drawn in 1 / r^i of the size, r uniform in [2, 4), enlarged bilinearly, and weighs discount^i; a side of
    one pixel ends it. Source: J. Whitaker, "Multi-resolution noise for diffusion model training" (wandb.ai, 2023).
    """
    height, width = noise.shape[-2:]
    total = noise.clone()
    for level in range(options.multires_noise_iterations):
        ratio = 2.0 + 2.0 * float(torch.rand((), generator=generator))
        small = (max(1, int(height / ratio**level)), max(1, int(width / ratio**level)))
        coarse = torch.randn((1, len(noise), *small), generator=generator)
        total += interpolate(coarse, size=(height, width), mode="bilinear")[0] * options.multires_noise_discount**level
        if 1 in small:
            break
    return total / total.std()


def flow_sigma(options: ObjectiveOptions, generator: torch.Generator) -> Tensor:
    """The share of noise of one sample of rectified flow, float32 [1] in (0, 1).

    Uniform or logit-normal, then shifted towards noise: s x / (1 + (s - 1) x), then into the range of timesteps.
    Source: Stable Diffusion 3, arXiv:2403.03206, sec. 3.1 and 5.3.2.
    """
    if options.flow_sampling == "uniform":
        sigma = torch.rand(1, generator=generator)
    else:
        normal = torch.randn(1, generator=generator)
        sigma = torch.sigmoid(options.flow_logit_mean + options.flow_logit_std * normal)
    sigma = options.flow_shift * sigma / (1.0 + (options.flow_shift - 1.0) * sigma)
    low, high = options.min_timestep / NUM_TIMESTEPS, options.max_timestep / NUM_TIMESTEPS
    return (low + (high - low) * sigma).clamp(1e-5, 1.0 - 1e-5)
