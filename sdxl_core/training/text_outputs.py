"""Outputs of frozen text encoders, computed once before training and read from disk: the card holds no text encoder.

`text_outputs/<settings>/part-00000.safetensors`, each with the outputs of up to 256 captions and what they were made
of. A caption that is not there (a preview's, a caption with random parts) is encoded when it is met.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import safe_open
from safetensors.torch import save
from torch import Tensor

from sdxl_core.config import TrainConfig
from sdxl_core.files import digest_of, write_atomic
from sdxl_core.models import TokenIds, component_config, encode_prompts
from sdxl_core.models.presets import Preset
from sdxl_core.models.tokenizer import CHUNK
from sdxl_core.training.denoiser import Denoiser
from sdxl_core.training.training_set import TrainingSet

PART_CAPTIONS, BATCH, KEY_BYTES = 256, 16, 32


class TextOutputs:
    """prompt_embeds and pooled_prompt_embeds by caption."""

    def __init__(self, folder: Path, denoiser: Denoiser) -> None:
        """`folder`: for these encoders and this length of captions only; what is there is used."""
        self._folder, self._denoiser = folder, denoiser
        self._files: list[Any] = []
        self._places: dict[bytes, tuple[int, int]] = {}
        for path in sorted(folder.glob("part-*.safetensors")):
            self._open(path)

    def add(
        self, captions: Iterable[TokenIds], *, device: torch.device, leave: Callable[[], bool] = lambda: False
    ) -> None:
        """Encode, on `device`, what is not there yet. captions: one each, int64 [1, n, 77].

        leave: asked before each file; true: the rest is encoded the next time, or when it is met.
        """
        encoders = (self._denoiser.text_encoder, self._denoiser.text_encoder_2)
        wanted = ((key, tokens) for tokens in captions if (key := _key(tokens)) not in self._places)
        moved = False
        while not leave() and (part := list(islice(_once(wanted), PART_CAPTIONS))):
            if not moved:
                moved = True
                for encoder in encoders:
                    encoder.to(device)
            outputs = [self._encode([tokens for _, tokens in part[i : i + BATCH]]) for i in range(0, len(part), BATCH)]
            tensors = {
                "keys": torch.frombuffer(bytearray(b"".join(key for key, _ in part)), dtype=torch.uint8).view(
                    -1, KEY_BYTES
                ),
                "prompt_embeds": torch.cat([embeds for embeds, _ in outputs]),
                "pooled": torch.cat([pooled for _, pooled in outputs]),
            }
            path = self._folder / f"part-{len(self._files):05d}.safetensors"
            write_atomic(path, save(tensors))
            self._open(path)
        for encoder in encoders:
            encoder.to("cpu")

    def of(self, tokens: TokenIds) -> tuple[Tensor, Tensor]:
        """prompt_embeds [B, 75 n + 2, D] and pooled_prompt_embeds [B, P] of a batch, on the CPU."""
        rows = [self._row(one) for one in _singly(tokens)]
        return torch.stack([embeds for embeds, _ in rows]), torch.stack([pooled for _, pooled in rows])

    def _row(self, tokens: TokenIds) -> tuple[Tensor, Tensor]:
        place = self._places.get(_key(tokens))
        if place is None:
            embeds, pooled = self._encode([tokens])
            return embeds[0], pooled[0]
        file, row = self._files[place[0]], place[1]
        return file.get_slice("prompt_embeds")[row], file.get_slice("pooled")[row]

    @torch.no_grad()
    def _encode(self, captions: list[TokenIds]) -> tuple[Tensor, Tensor]:
        weights = [tokens.weights for tokens in captions if tokens.weights is not None]
        joined = TokenIds(
            clip_l=torch.cat([tokens.clip_l for tokens in captions]),
            clip_g=torch.cat([tokens.clip_g for tokens in captions]),
            weights=torch.cat(weights) if weights else None,
        )
        embeds, pooled = encode_prompts(self._denoiser.text_encoder, self._denoiser.text_encoder_2, joined)
        return embeds.cpu().contiguous(), pooled.cpu().contiguous()

    def _open(self, path: Path) -> None:
        file: Any = safe_open(path, framework="pt")
        for row, key in enumerate(file.get_tensor("keys").numpy()):
            self._places[key.tobytes()] = (len(self._files), row)
        self._files.append(file)


def outputs_bytes(config: TrainConfig, training_set: TrainingSet, preset: Preset, *, free: int) -> int:
    """What the outputs of a run take on the disk. Every caption counts, equal ones once where `free` bytes are too few

    for all of them: that needs a look at each.
    """
    if not config.cache_text_encoder_outputs:
        return 0
    num_states = config.max_token_length // CHUNK * CHUNK + 2
    width = int(component_config(preset, "unet")["cross_attention_dim"])
    pooled = int(component_config(preset, "text_encoder_2")["projection_dim"])
    is_half = config.weights_dtype == "bfloat16" or config.mixed_precision == "bf16"
    one = (num_states * width + pooled) * (2 if is_half else 4) + KEY_BYTES
    count = training_set.num_samples
    if (count + 1) * one > free:
        texts = (hash((sample.sentence, sample.tags)) for sample in training_set.samples)
        count = len(np.unique(np.fromiter(texts, np.int64, count)))
    return (count + 1) * one  # and the empty one


def _singly(tokens: TokenIds) -> Iterator[TokenIds]:
    for i in range(len(tokens.clip_l)):
        weights = None if tokens.weights is None else tokens.weights[i : i + 1]
        yield TokenIds(clip_l=tokens.clip_l[i : i + 1], clip_g=tokens.clip_g[i : i + 1], weights=weights)


def _once(pairs: Iterable[tuple[bytes, TokenIds]]) -> Iterator[tuple[bytes, TokenIds]]:
    """Each key once; what another part of this run has written since is left out by the caller's test."""
    seen: set[bytes] = set()
    for key, tokens in pairs:
        if key not in seen:
            seen.add(key)
            yield key, tokens


def _key(tokens: TokenIds) -> bytes:
    parts = [tokens.clip_l.numpy().tobytes(), tokens.clip_g.numpy().tobytes()]
    if tokens.weights is not None:
        parts.append(tokens.weights.numpy().tobytes())
    return bytes.fromhex(digest_of(*parts))
