"""One prediction type, from a sample's noise to its loss."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from sdxl_core.config.train.objective import ObjectiveOptions
from sdxl_core.training.objectives.losses import elementwise_loss, huber_thresholds, mean_over_mask, snr_weights
from sdxl_core.training.objectives.noise import NoiseDraw, draw_noise, fixed_draw
from sdxl_core.training.objectives.schedule import NUM_TIMESTEPS, alphas_cumprod, snr_of


class Objective:
    """Draws noise, adds it, and says how wrong a prediction is. Latents are always times the VAE's scaling factor."""

    def __init__(self, options: ObjectiveOptions, *, device: torch.device | str = "cpu") -> None:
        """`device`: where `noisy` and `losses` work; `draw` is on the CPU."""
        self.options = options
        self.alphas = alphas_cumprod(zero_terminal_snr=options.zero_terminal_snr).to(device)

    @property
    def is_flow(self) -> bool:
        return self.options.prediction_type == "rectified_flow"

    def draw(self, keys: Sequence[str], latents: Tensor, *, epoch: int, seed: int) -> NoiseDraw:
        """Noise and timesteps of the samples `keys` in `epoch`. latents: scaled, [B, 4, h, w], on the CPU."""
        return draw_noise(keys, latents, epoch=epoch, seed=seed, options=self.options)

    def fixed_draw(self, key: str, shape: Sequence[int], *, timesteps: tuple[int, int], seed: int) -> NoiseDraw:
        """Noise [4, h, w] and timestep [] of one sample, the same in every epoch; the timestep is in [low, high)."""
        return fixed_draw(key, shape, timesteps=timesteps, seed=seed, is_flow=self.is_flow)

    def noisy(self, latents: Tensor, draw: NoiseDraw) -> Tensor:
        """What the U-Net sees: signal * latents + noise, with input perturbation, float32 [B, 4, h, w]."""
        signal, share = self._signal_and_noise(draw.timesteps)
        noise = draw.noise if draw.perturbation is None else draw.noise + draw.perturbation
        return signal * latents + share * noise

    def target(self, latents: Tensor, draw: NoiseDraw) -> Tensor:
        """What the U-Net should answer, float32 [B, 4, h, w].

        epsilon: the noise;  v_prediction: sqrt(a) * noise - sqrt(1 - a) * latents (arXiv:2202.00512 appendix D);
        rectified_flow: noise - latents (arXiv:2209.03003, towards noise as in arXiv:2403.03206).
        """
        if self.options.prediction_type == "epsilon":
            return draw.noise
        if self.is_flow:
            return draw.noise - latents
        signal, share = self._signal_and_noise(draw.timesteps)
        return signal * draw.noise - share * latents

    def losses(self, prediction: Tensor, latents: Tensor, draw: NoiseDraw, mask: Tensor | None = None) -> Tensor:
        """The weighted loss of each sample, float32 [B], with gradient.

        prediction: [B, 4, h, w], any float.   mask: see `mean_over_mask`.
        """
        options = self.options
        signal, share = (part.flatten() for part in self._signal_and_noise(draw.timesteps))
        thresholds = huber_thresholds(share / signal, draw.timesteps, options)
        losses = mean_over_mask(
            elementwise_loss(prediction, self.target(latents, draw), options, thresholds), mask
        )  # fmt: skip
        if self.is_flow:
            return losses
        return losses * snr_weights(snr_of(self.alphas, draw.timesteps), options)

    def _signal_and_noise(self, timesteps: Tensor) -> tuple[Tensor, Tensor]:
        """What latents and noise are multiplied with, float32 [B, 1, 1, 1] each.

        sqrt(a) and sqrt(1 - a) (arXiv:2006.11239 eq. 4); of rectified flow 1 - sigma and sigma.
        """
        if self.is_flow:
            sigma = (timesteps / NUM_TIMESTEPS).view(-1, 1, 1, 1)
            return 1.0 - sigma, sigma
        alpha = self.alphas[timesteps].view(-1, 1, 1, 1)
        return alpha.sqrt(), (1.0 - alpha).sqrt()
