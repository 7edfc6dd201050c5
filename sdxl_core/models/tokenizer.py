"""CLIP's byte-pair tokens for both text encoders, in chunks of 75; the vocabulary ships inside a package."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from sdxl_core.dataset.tokens import count_tokens as count_tokens
from sdxl_core.dataset.tokens import token_ids as token_ids
from sdxl_core.models.weighted_text import weighted_parts

BOS, EOS = 49406, 49407
PAD_L, PAD_G = EOS, 0
CHUNK = 75


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenIds:
    """Token ids of a batch: int64 [B, num_chunks, 77] for CLIP-L (padded with 49407) and bigG (padded with 0).

    weights: float32 [B, num_chunks, 77]: what the hidden states of each token are multiplied with; None: with nothing.
    """

    clip_l: Tensor
    clip_g: Tensor
    weights: Tensor | None = None

    def to(self, device: torch.device | str) -> TokenIds:
        """The same ids on a device."""
        weights = None if self.weights is None else self.weights.to(device)
        return TokenIds(clip_l=self.clip_l.to(device), clip_g=self.clip_g.to(device), weights=weights)


def tokenize(captions: Sequence[str], *, max_token_length: Literal[75, 150, 225], weighted: bool = False) -> TokenIds:
    """Tokens of every caption, cut to `max_token_length`, in chunks of 75 as sd-scripts lays them out.

    A chunk is [BOS] + 75 ids + [the caption's very last id: EOS or padding]. For bigG, whose padding is 0, a chunk that
    is full ends in EOS and a chunk that is empty begins with EOS. (0 is also the token of a "!" inside a word,
    which this rule cannot tell from padding; it is sd-scripts' rule.)

    `weighted`: captions are read as `weighted_parts` does, each part is tokenised alone.
    Returns: int64 [B, max_token_length / 75, 77] an encoder.   Source: sd-scripts' SdxlTokenizeStrategy.
    """
    num_chunks = max_token_length // CHUNK
    if not weighted:
        ids = [token_ids(caption)[:max_token_length] for caption in captions]
        return TokenIds(clip_l=_chunks(ids, num_chunks, PAD_L), clip_g=_chunks(ids, num_chunks, PAD_G))
    tokens = [weighted_tokens(caption) for caption in captions]
    ids = [found[:max_token_length] for found, _ in tokens]
    weights = torch.ones(len(captions), num_chunks, CHUNK + 2)
    for row, (_, values) in zip(weights, tokens, strict=True):
        inner = torch.ones(max_token_length)
        inner[: len(values)] = torch.tensor(values[:max_token_length])
        row[:, 1:-1] = inner.view(num_chunks, CHUNK)
    return TokenIds(clip_l=_chunks(ids, num_chunks, PAD_L), clip_g=_chunks(ids, num_chunks, PAD_G), weights=weights)


def weighted_tokens(caption: str) -> tuple[list[int], list[float]]:
    """A caption's ids, and the weight of each."""
    ids: list[int] = []
    weights: list[float] = []
    for text, weight in weighted_parts(caption):
        found = token_ids(text)
        ids += found
        weights += [weight] * len(found)
    return ids, weights


def _chunks(captions: list[list[int]], num_chunks: int, pad: int) -> Tensor:
    inner = num_chunks * CHUNK
    rows = torch.full((len(captions), inner + 2), pad, dtype=torch.int64)
    rows[:, 0] = BOS
    for row, ids in zip(rows, captions, strict=True):
        row[1 : 1 + len(ids)] = torch.tensor(ids, dtype=torch.int64)
        row[1 + len(ids)] = EOS
    chunks = torch.full((len(captions), num_chunks, CHUNK + 2), pad, dtype=torch.int64)
    for number in range(num_chunks):
        chunks[:, number, 0] = BOS
        chunks[:, number, 1:-1] = rows[:, 1 + CHUNK * number : 1 + CHUNK * (number + 1)]
        chunks[:, number, -1] = rows[:, -1]
    if pad == PAD_G and num_chunks > 1:
        last = chunks[:, :, -2]
        chunks[:, :, -1] = torch.where((last != EOS) & (last != PAD_G), EOS, chunks[:, :, -1])
        chunks[:, :, 1] = torch.where(chunks[:, :, 1] == PAD_G, EOS, chunks[:, :, 1])
    return chunks
