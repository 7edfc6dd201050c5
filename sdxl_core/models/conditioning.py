"""What the U-Net is conditioned on: both encoders' hidden states, bigG's pooled text, sizes and crop."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from sdxl_core.models.tokenizer import CHUNK, EOS, TokenIds


def encode_prompts(text_encoder: Any, text_encoder_2: Any, token_ids: TokenIds) -> tuple[Tensor, Tensor]:
    """Both text encoders' conditioning, differentiable.

    Args:   token_ids: int64 [B, n, 77] for each encoder, on any device; their weights multiply the hidden states, not
            the pooled text, as in sd-scripts.
    Returns: prompt_embeds [B, 75 n + 2, D1 + D2] (penultimate hidden states, no final norm) and pooled_prompt_embeds
            [B, P]: bigG's projected state at the first EOS of the first chunk.
    Source: SDXL paper arXiv:2307.01952 sec. 2.1; parity with diffusers' StableDiffusionXLPipeline.encode_prompt.
    """
    hidden_1, _ = _hidden_states(text_encoder, token_ids.clip_l)
    hidden_2, last_2 = _hidden_states(text_encoder_2, token_ids.clip_g)
    num_captions, num_chunks, _ = token_ids.clip_g.shape
    joined = [_join_chunks(hidden, num_captions, num_chunks) for hidden in (hidden_1, hidden_2)]
    if token_ids.weights is not None:
        weights = _join_chunks(token_ids.weights.reshape(-1, CHUNK + 2, 1), num_captions, num_chunks)
        joined = [hidden * weights.to(hidden) for hidden in joined]
    first_chunks = last_2[::num_chunks]
    end = (token_ids.clip_g[:, 0] == EOS).int().argmax(dim=-1).to(last_2.device)
    pooled = first_chunks[torch.arange(num_captions, device=end.device), end]
    return torch.cat(joined, dim=-1), text_encoder_2.text_projection(pooled)


def _hidden_states(encoder: Any, ids: Tensor) -> tuple[Tensor, Tensor]:
    """(penultimate hidden states, last hidden state after the final norm), each [B n, 77, D]."""
    flat = ids.reshape(-1, ids.shape[-1]).to(next(encoder.parameters()).device)
    output = encoder(flat, output_hidden_states=True)
    return output.hidden_states[-2], output.last_hidden_state


def _join_chunks(hidden: Tensor, num_captions: int, num_chunks: int) -> Tensor:
    """[B n, 77, D] -> [B, 75 n + 2, D]: first BOS, the inner states of every chunk, the last chunk's last state."""
    if num_chunks == 1:
        return hidden
    chunks = hidden.reshape(num_captions, num_chunks, CHUNK + 2, -1)
    inner = chunks[:, :, 1:-1].reshape(num_captions, num_chunks * CHUNK, -1)
    return torch.cat([chunks[:, 0, :1], inner, chunks[:, -1, -1:]], dim=1)


def time_ids(*, original_size: Tensor, crop_top_left: Tensor, target_size: Tensor) -> Tensor:
    """SDXL's micro-conditioning, float32 [B, 6].

    Args: [B, 2] tensors in pixels: original (height, width), crop (top, left), target (height, width).
    Source: SDXL paper arXiv:2307.01952 sec. 2.2; parity with StableDiffusionXLPipeline._get_add_time_ids.
    """
    return torch.cat([original_size, crop_top_left, target_size], dim=1).to(torch.float32)
