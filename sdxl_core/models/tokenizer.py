"""CLIP's byte-pair tokens for both text encoders, in chunks of 75; the vocabulary ships inside a package."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from sdxl_core.dataset.tokens import count_tokens as count_tokens
from sdxl_core.dataset.tokens import token_ids as token_ids

BOS, EOS = 49406, 49407
PAD_L, PAD_G = EOS, 0
CHUNK = 75


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenIds:
    """Token ids of a batch: int64 [B, num_chunks, 77] for CLIP-L (padded with 49407) and bigG (padded with 0)."""

    clip_l: Tensor
    clip_g: Tensor

    def to(self, device: torch.device | str) -> TokenIds:
        """The same ids on a device."""
        return TokenIds(clip_l=self.clip_l.to(device), clip_g=self.clip_g.to(device))


def tokenize(captions: Sequence[str], *, max_token_length: Literal[75, 150, 225]) -> TokenIds:
    """Tokens of every caption, cut to `max_token_length`, in chunks of 75 as sd-scripts lays them out.

    A chunk is [BOS] + 75 ids + [the caption's very last id: EOS or padding]. For bigG, whose padding is 0, a chunk that
    is full ends in EOS and a chunk that is empty begins with EOS. (0 is also the token of a "!" inside a word,
    which this rule cannot tell from padding; it is sd-scripts' rule.)

    Returns: int64 [B, max_token_length / 75, 77] an encoder.   Source: sd-scripts' SdxlTokenizeStrategy.
    """
    num_chunks = max_token_length // CHUNK
    ids = [token_ids(caption)[:max_token_length] for caption in captions]
    return TokenIds(clip_l=_chunks(ids, num_chunks, PAD_L), clip_g=_chunks(ids, num_chunks, PAD_G))


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
