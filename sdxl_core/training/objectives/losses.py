"""How far a prediction is from its target, and how much each sample counts. All in float32."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn.functional import adaptive_avg_pool2d

from sdxl_core.config.train.objective import ObjectiveOptions
from sdxl_core.training.objectives.schedule import MAX_SNR, NUM_TIMESTEPS


def elementwise_loss(prediction: Tensor, target: Tensor, options: ObjectiveOptions, thresholds: Tensor) -> Tensor:
    """l2: d^2; l1: |d|; huber: 2c (sqrt(d^2 + c^2) - c); smooth_l1: 2 (sqrt(d^2 + c^2) - c); d is the difference.

    thresholds: c of each sample, float32 [B]. Returns float32 [B, 4, h, w].
    Source: pseudo-Huber loss, arXiv:2403.16728 (its form with the factor 2c, so that huber is d^2 where d is small).
    """
    difference = prediction.float() - target.float()
    if options.loss_type == "l2":
        return difference.square()
    if options.loss_type == "l1":
        return difference.abs()
    c = thresholds.view(-1, 1, 1, 1)
    root = (difference.square() + c.square()).sqrt() - c
    return 2.0 * c * root if options.loss_type == "huber" else 2.0 * root


def huber_thresholds(noise_to_signal: Tensor, timesteps: Tensor, options: ObjectiveOptions) -> Tensor:
    """The c of Huber and smooth L1 for each sample, float32 [B].

    snr: (1 - c0) / (1 + noise / signal)^2 + c0;  exponential: c0^(t / 1000) times huber_scale;  constant: c0 times
    huber_scale, with c0 = huber_c.   noise_to_signal: sqrt(1 / SNR), infinite where no signal is left.
    Source: arXiv:2403.16728 sec. 3; as sd-scripts computes them.
    """
    if options.huber_schedule == "snr":
        return (1.0 - options.huber_c) / (1.0 + noise_to_signal).square() + options.huber_c
    if options.huber_schedule == "exponential":
        return torch.exp(math.log(options.huber_c) / NUM_TIMESTEPS * timesteps.float()) * options.huber_scale
    return torch.full_like(noise_to_signal, options.huber_c * options.huber_scale)


def mean_over_mask(losses: Tensor, mask: Tensor | None) -> Tensor:
    """The mean of each sample's elementwise losses times its mask, float32 [B].

    losses: [B, 4, h, w].   mask: float32 [B, 1, H, W] in [0, 1], in pixels; averaged over each latent's area. Masked
    elements count in the mean as zeros, as in sd-scripts: a picture weighs what its visible area weighs.
    """
    if mask is not None:
        losses = losses * adaptive_avg_pool2d(mask, (losses.shape[2], losses.shape[3]))
    return losses.mean(dim=(1, 2, 3))


def min_snr_weights(snr: Tensor, *, snr_gamma: float, predicts_v: bool = False) -> Tensor:
    """Weight min(SNR, snr_gamma) / SNR of each sample, for v prediction over SNR + 1. float32 [B] in [0, 1].

    Source: arXiv:2303.09556 sec. 3.4; for v its released code.
    """
    return snr.clamp(max=snr_gamma) / (snr + 1.0 if predicts_v else snr)


def debiased_weights(snr: Tensor, *, predicts_v: bool = False) -> Tensor:
    """Weight 1 / sqrt(SNR), for v prediction 1 / (SNR + 1), float32 [B]. Source: arXiv:2310.08442."""
    snr = snr.clamp(max=MAX_SNR)
    return 1.0 / (snr + 1.0) if predicts_v else snr.rsqrt()


def v_scale(snr: Tensor) -> Tensor:
    """SNR / (SNR + 1): what turns a loss on v into one like that on noise. float32 [B]."""
    snr = snr.clamp(max=MAX_SNR)
    return snr / (snr + 1.0)


def snr_weights(snr: Tensor, options: ObjectiveOptions) -> Tensor:
    """The product of all weights that are switched on, of each sample, float32 [B].

    snr: of the schedule that is trained on. Order as in sd-scripts: min-SNR, scale_v, v-like, debiased.
    """
    predicts_v = options.prediction_type == "v_prediction"
    weights = torch.ones_like(snr)
    if options.min_snr_gamma is not None:
        weights = weights * min_snr_weights(snr, snr_gamma=options.min_snr_gamma, predicts_v=predicts_v)
    if options.scale_v_pred_loss_like_noise_pred:
        weights = weights * v_scale(snr)
    if options.v_pred_like_loss:
        weights = weights * (1.0 + options.v_pred_like_loss / v_scale(snr))
    if options.debiased_estimation_loss:
        weights = weights * debiased_weights(snr, predicts_v=predicts_v)
    return weights
