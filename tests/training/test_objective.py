"""Parity of noise schedule, noising, targets, losses and weights with diffusers and with closed forms."""

import math
from typing import Any

import pytest
import torch
from diffusers import DDIMScheduler, DDPMScheduler, FlowMatchEulerDiscreteScheduler
from diffusers.training_utils import compute_density_for_timestep_sampling, compute_snr
from torch import Tensor

from sdxl_core.config import TrainOptions
from sdxl_core.training.objectives import NoiseDraw, Objective
from sdxl_core.training.objectives.losses import (
    debiased_weights,
    huber_thresholds,
    mean_over_mask,
    min_snr_weights,
    snr_weights,
    v_scale,
)
from sdxl_core.training.objectives.noise import draw_noise
from sdxl_core.training.objectives.sampling import sampling_scheduler
from sdxl_core.training.objectives.schedule import NUM_TIMESTEPS, alphas_cumprod, snr_of

KEYS = ("a", "b", "c", "d")
MANY = tuple(str(i) for i in range(500))
SDXL = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "num_train_timesteps": 1000}
ALL = torch.arange(NUM_TIMESTEPS)
V: dict[str, Any] = {"prediction_type": "v_prediction"}
ZTSNR = V | {"zero_terminal_snr": True}
FLOW: dict[str, Any] = {"prediction_type": "rectified_flow"}


@pytest.fixture(scope="module")
def reference() -> DDPMScheduler:
    """The scheduler of SDXL base 1.0's own scheduler_config.json."""
    return DDPMScheduler(**SDXL)


@pytest.fixture(scope="module")
def zero_snr() -> DDPMScheduler:
    return DDPMScheduler(**SDXL, rescale_betas_zero_snr=True, prediction_type="v_prediction")


def latents_like(height: int, width: int, num: int = len(KEYS)) -> Tensor:
    return torch.randn(num, 4, height, width, generator=torch.Generator().manual_seed(0))


def draw(keys: tuple[str, ...] = KEYS, *, side: int = 8, epoch: int = 0, seed: int = 0, **options: Any) -> NoiseDraw:
    latents = latents_like(side, side, len(keys))
    return draw_noise(keys, latents, epoch=epoch, seed=seed, options=TrainOptions(**options))


def test_the_schedule_is_diffusers(reference: DDPMScheduler) -> None:
    assert torch.equal(alphas_cumprod(), reference.alphas_cumprod)


def test_the_zero_snr_schedule_is_diffusers_and_ends_in_noise(zero_snr: DDPMScheduler) -> None:
    alphas = alphas_cumprod(zero_terminal_snr=True)
    # diffusers goes on to betas and multiplies them up again, in float32, and ends at 2^-24 in place of 0
    torch.testing.assert_close(alphas, zero_snr.alphas_cumprod, rtol=2e-5, atol=1e-6)
    assert alphas[-1] == 0 and alphas[0] == pytest.approx(float(alphas_cumprod()[0]), rel=1e-6)
    assert (alphas.diff() < 0).all()


@pytest.mark.parametrize("options", [{}, V])
def test_noisy_latents_and_targets_are_diffusers(reference: DDPMScheduler, options: dict[str, Any]) -> None:
    objective = Objective(TrainOptions(**options))
    latents, noise = latents_like(8, 16), draw_noise(KEYS, latents_like(8, 16), epoch=2, seed=5)
    expected = reference.add_noise(latents, noise.noise, noise.timesteps)
    torch.testing.assert_close(objective.noisy(latents, noise), expected, rtol=1e-6, atol=1e-6)
    velocity = reference.get_velocity(latents, noise.noise, noise.timesteps)
    wanted = velocity if options else noise.noise
    torch.testing.assert_close(objective.target(latents, noise), wanted, rtol=1e-6, atol=1e-6)


def test_zero_snr_noise_and_velocity_are_diffusers(zero_snr: DDPMScheduler) -> None:
    objective = Objective(TrainOptions(**ZTSNR))
    latents = latents_like(8, 8)
    noise = NoiseDraw(noise=latents_like(8, 8).flip(0), timesteps=torch.tensor([0, 500, 998, 999]))
    expected = zero_snr.add_noise(latents, noise.noise, noise.timesteps)
    torch.testing.assert_close(objective.noisy(latents, noise), expected, rtol=1e-3, atol=1e-3)
    velocity = zero_snr.get_velocity(latents, noise.noise, noise.timesteps)
    torch.testing.assert_close(objective.target(latents, noise), velocity, rtol=1e-3, atol=1e-3)
    assert torch.equal(objective.noisy(latents, noise)[3], noise.noise[3]), "nothing of the picture is left"
    assert torch.equal(objective.target(latents, noise)[3], -latents[3])


def test_flow_noise_is_diffusers_and_its_target_is_the_direction() -> None:
    objective = Objective(TrainOptions(**FLOW, flow_shift=3.0))
    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
    latents, noise = latents_like(8, 8), latents_like(8, 8).flip(0)
    timesteps = scheduler.timesteps[[0, 10, 500, 999]]
    at = NoiseDraw(noise=noise, timesteps=timesteps)
    expected = scheduler.scale_noise(latents, timesteps, noise)
    torch.testing.assert_close(objective.noisy(latents, at), expected, rtol=1e-5, atol=1e-5)
    assert torch.equal(objective.target(latents, at), noise - latents)
    later = NoiseDraw(noise=noise, timesteps=timesteps * 0.5)
    moved = objective.noisy(latents, at) - objective.noisy(latents, later)
    torch.testing.assert_close(moved, objective.target(latents, at) * (timesteps / 2000).view(-1, 1, 1, 1))


def test_flow_timesteps_are_logit_normal_then_shifted() -> None:
    sigma = draw(MANY, side=2, **FLOW, flow_logit_mean=0.5, flow_logit_std=1.5).timesteps / 1000
    logits = torch.logit(sigma)
    assert abs(float(logits.mean()) - 0.5) < 0.2 and abs(float(logits.std()) - 1.5) < 0.15
    density = compute_density_for_timestep_sampling("logit_normal", 20_000, 0.5, 1.5, generator=torch.Generator())
    assert abs(float(sigma.median()) - float(density.median())) < 0.05
    shifted = draw(MANY, side=2, **FLOW, flow_logit_mean=0.5, flow_logit_std=1.5, flow_shift=3.0).timesteps / 1000
    torch.testing.assert_close(shifted, 3.0 * sigma / (1.0 + 2.0 * sigma))
    table = FlowMatchEulerDiscreteScheduler(shift=3.0).sigmas[:1000]
    plain = torch.linspace(1, 0.001, 1000)
    torch.testing.assert_close(table, 3.0 * plain / (1.0 + 2.0 * plain), rtol=1e-4, atol=1e-5)
    flat = draw(MANY, side=2, **FLOW, flow_sampling="uniform", min_timestep=200, max_timestep=600).timesteps
    assert flat.min() > 200 and flat.max() < 600 and abs(float(flat.mean()) - 400) < 20
    assert flat.dtype == torch.float32


@pytest.mark.parametrize("options", [{}, V, ZTSNR, FLOW])
def test_a_perfect_prediction_costs_nothing_and_a_step_from_it_leads_to_the_picture(options: dict[str, Any]) -> None:
    """Through diffusers' own sampler: what the U-Net should answer takes noisy latents back to the clean ones."""
    objective = Objective(TrainOptions(**options))
    latents = latents_like(8, 8)
    scheduler = sampling_scheduler(objective.options, 10)
    timestep = scheduler.timesteps[4:5]
    noise = NoiseDraw(noise=latents.flip(0), timesteps=timestep.expand(4))
    prediction = objective.target(latents, noise)
    assert objective.losses(prediction, latents, noise).sum() == 0
    noisy = objective.noisy(latents, noise)
    if isinstance(scheduler, DDIMScheduler):
        clean = scheduler.step(prediction, int(timestep), noisy).pred_original_sample
    else:
        clean = noisy - timestep / 1000 * prediction
        stepped = scheduler.step(prediction, timestep, noisy).prev_sample
        expected = objective.noisy(latents, NoiseDraw(noise=noise.noise, timesteps=scheduler.timesteps[5:6].expand(4)))
        torch.testing.assert_close(stepped, expected, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(clean, latents, rtol=2e-3, atol=2e-3)


@pytest.mark.parametrize("snr_gamma", [1.0, 5.0, 20.0])
def test_min_snr_weights_are_the_papers(reference: DDPMScheduler, snr_gamma: float) -> None:
    """As diffusers' train_text_to_image_sdxl.py computes them, for noise and for v."""
    snr = compute_snr(reference, ALL)
    least = torch.stack([snr, torch.full_like(snr, snr_gamma)], dim=1).min(dim=1)[0]
    ours = snr_of(alphas_cumprod(), ALL)
    torch.testing.assert_close(ours, snr, rtol=1e-4, atol=0)
    weights = min_snr_weights(ours, snr_gamma=snr_gamma)
    torch.testing.assert_close(weights, least / snr, rtol=1e-4, atol=0)
    assert weights.max() == 1 and weights[0] < 0.02
    torch.testing.assert_close(
        min_snr_weights(ours, snr_gamma=snr_gamma, predicts_v=True), least / (snr + 1), rtol=1e-4, atol=0
    )


def test_weights_of_the_zero_snr_schedule_belong_to_it() -> None:
    """sd-scripts weighs by the schedule before it is rescaled; there the last timestep would count."""
    snr = snr_of(Objective(TrainOptions(**ZTSNR)).alphas, ALL)
    weights = min_snr_weights(snr, snr_gamma=5.0, predicts_v=True)
    assert weights[-1] == 0 and weights.isfinite().all()
    assert min_snr_weights(snr_of(alphas_cumprod(), ALL), snr_gamma=5.0, predicts_v=True)[-1] > 0.004


def test_debiased_v_scale_and_v_like_weights_are_their_closed_forms() -> None:
    snr = snr_of(alphas_cumprod(), ALL)
    clamped = snr.clamp(max=1000)
    torch.testing.assert_close(debiased_weights(snr), 1 / clamped.sqrt())
    torch.testing.assert_close(debiased_weights(snr, predicts_v=True), 1 / (clamped + 1))
    torch.testing.assert_close(v_scale(snr), clamped / (clamped + 1))
    both = snr_weights(snr, TrainOptions(min_snr_gamma=5.0, v_pred_like_loss=0.5, debiased_estimation_loss=True))
    expected = snr.clamp(max=5) / snr * (1 + 0.5 * (clamped + 1) / clamped) / clamped.sqrt()
    torch.testing.assert_close(both, expected)
    scaled = snr_weights(snr, TrainOptions(**V, scale_v_pred_loss_like_noise_pred=True))
    torch.testing.assert_close(scaled, clamped / (clamped + 1))


def test_a_scaled_v_loss_is_the_loss_on_noise() -> None:
    """With v = f(noise) a wrong v by d is a wrong noise by sqrt(a) d, and a = SNR / (SNR + 1)."""
    latents, noise = latents_like(8, 8), draw()
    wrong = Objective(TrainOptions(**V)).target(latents, noise) + 0.3
    alpha = alphas_cumprod()[noise.timesteps]
    like = Objective(TrainOptions(**V, scale_v_pred_loss_like_noise_pred=True)).losses(wrong, latents, noise)
    torch.testing.assert_close(like, 0.09 * alpha, rtol=5e-3, atol=0)  # SNR is clamped at 1000 at the first timesteps


@pytest.mark.parametrize(
    ("loss_type", "expected"),
    [
        ("l2", lambda d, c: d * d),
        ("l1", lambda d, c: abs(d)),
        ("huber", lambda d, c: 2 * c * (math.sqrt(d * d + c * c) - c)),
        ("smooth_l1", lambda d, c: 2 * (math.sqrt(d * d + c * c) - c)),
    ],
)
def test_losses_are_their_closed_forms(loss_type: str, expected: Any) -> None:
    options = TrainOptions(loss_type=loss_type, huber_schedule="constant", huber_c=0.25, huber_scale=2.0)
    latents, noise = latents_like(8, 8), draw()
    for difference in (-3.0, 0.01, 0.7):
        losses = Objective(options).losses((noise.noise + difference).double(), latents, noise)
        assert losses.dtype == torch.float32 and losses.shape == (4,)
        torch.testing.assert_close(losses, torch.full((4,), expected(difference, 0.5)), rtol=2e-4, atol=1e-7)


def test_huber_is_the_squared_error_where_the_difference_is_small() -> None:
    latents, noise = latents_like(8, 8), draw()
    wrong = noise.noise + 1e-2
    options = {"huber_schedule": "constant", "huber_c": 1.0}
    huber = Objective(TrainOptions(loss_type="huber", **options)).losses(wrong, latents, noise)
    torch.testing.assert_close(huber, Objective(TrainOptions()).losses(wrong, latents, noise), rtol=1e-2, atol=0)


def test_huber_thresholds_follow_their_schedules() -> None:
    sigma = ((1 - alphas_cumprod()) / alphas_cumprod()).sqrt()
    by_snr = huber_thresholds(sigma, ALL, TrainOptions(huber_c=0.1))
    torch.testing.assert_close(by_snr, 0.9 / (1 + sigma) ** 2 + 0.1)
    exponential = huber_thresholds(sigma, ALL, TrainOptions(huber_schedule="exponential", huber_c=0.1, huber_scale=2.0))
    assert float(exponential[0]) == pytest.approx(2.0)
    torch.testing.assert_close(exponential, 2.0 * 0.1 ** (ALL / 1000))
    constant = huber_thresholds(sigma, ALL, TrainOptions(huber_schedule="constant", huber_c=0.1, huber_scale=3.0))
    torch.testing.assert_close(constant, torch.full((1000,), 0.3))
    assert float(huber_thresholds(torch.tensor([math.inf]), ALL[-1:], TrainOptions())) == pytest.approx(0.1)


def test_masked_parts_cost_nothing_and_halves_count_half() -> None:
    losses = torch.ones(2, 4, 4, 4)
    mask = torch.ones(2, 1, 32, 32)
    mask[0, :, :, :16] = 0.0
    mask[1, :, :8, :4] = 0.0  # half of each of two latents of the first row's … of 16
    masked = mean_over_mask(losses, mask)
    assert masked.tolist() == [0.5, 1 - 1 / 32]
    objective, latents, noise = (
        Objective(TrainOptions(masked_loss=True)),
        latents_like(4, 4, 2),
        draw(("a", "b"), side=4),
    )
    wrong = noise.noise.clone()
    wrong[0, :, :, :2] += 100.0
    assert objective.losses(wrong, latents, noise, mask)[0] == 0


def test_noise_belongs_to_the_sample_not_to_its_place_in_a_batch() -> None:
    everything = {
        "noise_offset": 0.1, "noise_offset_random_strength": True, "adaptive_noise_scale": 0.01,
        "multires_noise_iterations": 4, "ip_noise_gamma": 0.1, "ip_noise_gamma_random_strength": True,
    }  # fmt: skip
    options = TrainOptions(**everything)
    latents = latents_like(8, 8)
    together = draw_noise(KEYS, latents, epoch=1, seed=0, options=options)
    alone = draw_noise(("c",), latents[2:3], epoch=1, seed=0, options=options)
    assert torch.equal(together.noise[2:3], alone.noise) and torch.equal(together.timesteps[2:3], alone.timesteps)
    assert alone.perturbation is not None and together.perturbation is not None
    assert torch.equal(together.perturbation[2:3], alone.perturbation)
    for epoch, seed in ((2, 0), (1, 1)):
        other = draw_noise(("c",), latents[2:3], epoch=epoch, seed=seed, options=options)
        assert not torch.equal(other.noise, alone.noise)


def test_timesteps_are_uniform_and_noise_is_normal() -> None:
    drawn = draw(tuple(str(i) for i in range(3000)), side=2)
    assert drawn.timesteps.min() < 5 and drawn.timesteps.max() > NUM_TIMESTEPS - 6
    counts = torch.bincount(drawn.timesteps // 100, minlength=10)
    assert counts.min() > 240 and counts.max() < 360
    assert abs(float(drawn.noise.mean())) < 0.02 and abs(float(drawn.noise.std()) - 1) < 0.02


def test_timesteps_stay_within_their_range() -> None:
    timesteps = draw(MANY, side=2, min_timestep=200, max_timestep=203).timesteps
    assert set(timesteps.tolist()) == {200, 201, 202}


def test_noise_offset_shifts_whole_channels() -> None:
    plain, shifted = draw(MANY), draw(MANY, noise_offset=0.1)
    difference = shifted.noise - plain.noise
    torch.testing.assert_close(difference, difference[:, :, :1, :1].expand_as(difference), atol=1e-6, rtol=0)
    assert 0.09 < float(difference[:, :, 0, 0].std()) < 0.11
    assert torch.equal(plain.timesteps, shifted.timesteps)


def test_a_random_offset_is_a_share_of_the_fixed_one() -> None:
    plain, fixed, random = draw(MANY), draw(MANY, noise_offset=0.1), draw(
        MANY, noise_offset=0.1, noise_offset_random_strength=True
    )  # fmt: skip
    share = ((random.noise - plain.noise) / (fixed.noise - plain.noise)).flatten(1).median(dim=1)[0]
    assert share.min() >= -1e-3 and share.max() <= 1 + 1e-3
    assert abs(float(share.mean()) - 0.5) < 0.05 and float(share.std()) > 0.25


def test_an_adaptive_offset_grows_with_the_channels_mean() -> None:
    latents = torch.zeros(1, 4, 8, 8)
    latents[0, 1], latents[0, 2] = 3.0, -5.0
    key = ("a",)

    def offsets(**options: float) -> Tensor:
        shifted = draw_noise(key, latents, epoch=0, seed=0, options=TrainOptions(**options))
        return (shifted.noise - draw_noise(key, latents, epoch=0, seed=0).noise)[0, :, 0, 0]

    normal = offsets(noise_offset=1.0)
    torch.testing.assert_close(
        offsets(noise_offset=0.1, adaptive_noise_scale=0.02), normal * torch.tensor([0.1, 0.16, 0.2, 0.1]),
        rtol=1e-4, atol=1e-6,
    )  # fmt: skip
    torch.testing.assert_close(
        offsets(noise_offset=0.1, adaptive_noise_scale=-0.04), normal * torch.tensor([0.1, 0.0, 0.0, 0.1]),
        rtol=1e-4, atol=1e-6,
    )  # fmt: skip


def test_multires_noise_is_coarser_and_of_unit_variance() -> None:
    plain, coarse = draw(MANY[:100], side=32), draw(MANY[:100], side=32, multires_noise_iterations=8)
    torch.testing.assert_close(coarse.noise.std(dim=(1, 2, 3)), torch.ones(100), rtol=1e-5, atol=1e-5)

    def neighbours(noise: Tensor) -> float:
        return float((noise[..., 1:] * noise[..., :-1]).mean())

    assert abs(neighbours(plain.noise)) < 0.01 and neighbours(coarse.noise) > 0.02
    one_level = draw(MANY[:100], side=32, multires_noise_iterations=1).noise
    assert abs(neighbours(one_level)) < 0.01, "the first level has the full size"
    assert torch.equal(plain.timesteps, coarse.timesteps)


def test_input_perturbation_reaches_the_input_and_not_the_target() -> None:
    objective, latents = Objective(TrainOptions(ip_noise_gamma=0.1)), latents_like(8, 8)
    plain, perturbed = draw(), draw(ip_noise_gamma=0.1)
    assert torch.equal(plain.noise, perturbed.noise) and perturbed.perturbation is not None
    assert abs(float(perturbed.perturbation.std()) - 0.1) < 0.01
    assert torch.equal(objective.target(latents, perturbed), plain.noise)
    alpha = alphas_cumprod()[plain.timesteps].view(-1, 1, 1, 1)
    difference = objective.noisy(latents, perturbed) - objective.noisy(latents, plain)
    torch.testing.assert_close(difference, (1 - alpha).sqrt() * perturbed.perturbation, rtol=1e-4, atol=1e-5)
    random = draw(MANY, ip_noise_gamma=0.1, ip_noise_gamma_random_strength=True).perturbation
    assert random is not None
    strengths = random.std(dim=(1, 2, 3))
    assert strengths.max() < 0.12 and strengths.min() < 0.01 and abs(float(strengths.mean()) - 0.05) < 0.01


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"min_timestep": 500, "max_timestep": 500}, "must be below max_timestep"),
        ({"zero_terminal_snr": True}, "needs prediction_type = v_prediction"),
        (FLOW | {"min_snr_gamma": 5.0}, "min_snr_gamma weighs by SNR, which rectified_flow does not"),
        ({"scale_v_pred_loss_like_noise_pred": True}, "needs prediction_type = v_prediction"),
        (V | {"v_pred_like_loss": 0.5}, "needs prediction_type = epsilon"),
    ],
)
def test_options_that_contradict_each_other_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        TrainOptions(**options)
