"""Parity of noise schedule, noising and loss weights with diffusers and with closed forms."""

import pytest
import torch
from diffusers import DDPMScheduler
from diffusers.training_utils import compute_snr

from sdxl_core.training.objective import (
    NUM_TIMESTEPS,
    NoiseDraw,
    add_noise,
    alphas_cumprod,
    draw_noise,
    min_snr_weights,
    sample_losses,
)

KEYS = ("a", "b", "c", "d")


@pytest.fixture(scope="module")
def reference() -> DDPMScheduler:
    """The scheduler of SDXL base 1.0's own scheduler_config.json."""
    return DDPMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", num_train_timesteps=1000)


def test_the_schedule_is_diffusers(reference: DDPMScheduler) -> None:
    assert torch.equal(alphas_cumprod(), reference.alphas_cumprod)


def test_noisy_latents_are_diffusers(reference: DDPMScheduler) -> None:
    draw = draw_noise(KEYS, height=8, width=16, epoch=2, seed=5)
    latents = torch.randn(4, 4, 8, 16, generator=torch.Generator().manual_seed(0))
    expected = reference.add_noise(latents, draw.noise, draw.timesteps)
    torch.testing.assert_close(add_noise(latents, draw, alphas_cumprod()), expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("snr_gamma", [1.0, 5.0, 20.0])
def test_min_snr_weights_are_the_papers(reference: DDPMScheduler, snr_gamma: float) -> None:
    timesteps = torch.arange(NUM_TIMESTEPS)
    snr = compute_snr(reference, timesteps)
    expected = torch.stack([snr, torch.full_like(snr, snr_gamma)], dim=1).min(dim=1)[0] / snr
    weights = min_snr_weights(alphas_cumprod(), timesteps, snr_gamma=snr_gamma)
    torch.testing.assert_close(weights, expected, rtol=1e-5, atol=0)
    assert weights.max() == 1 and weights[0] < 0.02


def test_the_loss_is_the_mean_squared_error_of_each_sample() -> None:
    draw = draw_noise(KEYS, height=8, width=8, epoch=0, seed=0)
    prediction = torch.zeros(4, 4, 8, 8)
    plain = sample_losses(prediction.bfloat16(), draw, alphas_cumprod())
    assert plain.dtype == torch.float32
    torch.testing.assert_close(plain, draw.noise.square().mean(dim=(1, 2, 3)))
    weighted = sample_losses(prediction, draw, alphas_cumprod(), min_snr_gamma=5.0)
    torch.testing.assert_close(weighted, plain * min_snr_weights(alphas_cumprod(), draw.timesteps, snr_gamma=5.0))


def test_noise_belongs_to_the_sample_not_to_its_place_in_a_batch() -> None:
    together = draw_noise(KEYS, height=8, width=8, epoch=1, seed=0)
    alone = draw_noise(("c",), height=8, width=8, epoch=1, seed=0)
    assert torch.equal(together.noise[2:3], alone.noise) and torch.equal(together.timesteps[2:3], alone.timesteps)
    for epoch, seed in ((2, 0), (1, 1)):
        other = draw_noise(("c",), height=8, width=8, epoch=epoch, seed=seed)
        assert not torch.equal(other.noise, alone.noise)


def test_timesteps_are_uniform_and_noise_is_normal() -> None:
    draw = draw_noise([str(i) for i in range(3000)], height=2, width=2, epoch=0, seed=0)
    assert draw.timesteps.min() < 5 and draw.timesteps.max() > NUM_TIMESTEPS - 6
    counts = torch.bincount(draw.timesteps // 100, minlength=10)
    assert counts.min() > 240 and counts.max() < 360
    assert abs(float(draw.noise.mean())) < 0.02 and abs(float(draw.noise.std()) - 1) < 0.02


def test_noise_offset_shifts_whole_channels() -> None:
    keys = [str(i) for i in range(500)]
    plain = draw_noise(keys, height=8, width=8, epoch=0, seed=0)
    shifted = draw_noise(keys, height=8, width=8, epoch=0, seed=0, noise_offset=0.1)
    difference = shifted.noise - plain.noise
    torch.testing.assert_close(difference, difference[:, :, :1, :1].expand_as(difference), atol=1e-6, rtol=0)
    assert 0.09 < float(difference[:, :, 0, 0].std()) < 0.11
    assert torch.equal(plain.timesteps, shifted.timesteps)


def test_noise_draw_is_what_the_target_is() -> None:
    """Predicting the added noise exactly costs nothing."""
    draw = draw_noise(KEYS, height=4, width=4, epoch=0, seed=0)
    assert sample_losses(draw.noise, NoiseDraw(noise=draw.noise, timesteps=draw.timesteps), alphas_cumprod()).sum() == 0
