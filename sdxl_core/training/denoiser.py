"""U-Net and both text encoders as one module: text, latents and timesteps in, prediction out."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from sdxl_core.models import TokenIds, encode_prompts


class Denoiser(nn.Module):
    """One module, so that data parallelism has one set of gradients to exchange. Frozen parts take no gradient."""

    def __init__(self, unet: Any, text_encoder: Any, text_encoder_2: Any, *, holds_texts: bool = True) -> None:
        """`holds_texts`: false where captions come encoded; the encoders are then at hand, but no part of it."""
        super().__init__()
        self.unet = unet
        self.holds_texts = holds_texts
        keep: Any = setattr if holds_texts else object.__setattr__
        keep(self, "text_encoder", text_encoder)
        keep(self, "text_encoder_2", text_encoder_2)
        text_parameters = [*text_encoder.parameters(), *text_encoder_2.parameters()]
        self._trains_text = any(parameter.requires_grad for parameter in text_parameters)

    def forward(
        self,
        noisy: Tensor,
        timesteps: Tensor,
        clip_l: Tensor,
        clip_g: Tensor,
        time_ids: Tensor,
        token_weights: Tensor | None = None,
        encoded: tuple[Tensor, Tensor] | None = None,
    ) -> Tensor:
        """noisy: [B, 4, h, w]; timesteps: int64 or float32 [B]; clip_l, clip_g: int64 [B, n, 77]; time_ids: [B, 6];

        token_weights: float32 [B, n, 77] or None.   encoded: what the encoders would say, if it is known.
        Returns the prediction [B, 4, h, w].
        """
        if encoded is not None:
            return self._predict(noisy, timesteps, *encoded, time_ids)
        with torch.set_grad_enabled(self._trains_text and torch.is_grad_enabled()):
            prompt_embeds, pooled_prompt_embeds = encode_prompts(
                self.text_encoder, self.text_encoder_2, TokenIds(clip_l=clip_l, clip_g=clip_g, weights=token_weights)
            )
        return self._predict(noisy, timesteps, prompt_embeds, pooled_prompt_embeds, time_ids)

    def _predict(
        self, noisy: Tensor, timesteps: Tensor, prompt_embeds: Tensor, pooled_prompt_embeds: Tensor, time_ids: Tensor
    ) -> Tensor:
        prediction: Tensor = self.unet(
            noisy.to(self.unet.dtype),
            timesteps,
            encoder_hidden_states=prompt_embeds.to(self.unet.dtype),
            added_cond_kwargs={"text_embeds": pooled_prompt_embeds.to(self.unet.dtype), "time_ids": time_ids},
            return_dict=False,
        )[0]
        return prediction
