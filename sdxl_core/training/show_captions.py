"""Captions as training will tokenise them: the first that a run sees, what of each is cut, and what weighs what."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from sdxl_core.config import TrainConfig
from sdxl_core.dataset.tokens import token_ids, token_text
from sdxl_core.models.tokenizer import weighted_tokens
from sdxl_core.models.weighted_text import weighted_parts
from sdxl_core.training.batches import BatchMaker
from sdxl_core.training.training_set import read_training_set


@dataclass(frozen=True, slots=True, kw_only=True)
class ShownCaption:
    """The caption of sample `key` at optimizer step `step` (from 1).

    seen, cut: what its tokens stand for, up to and behind max_token_length.   weights: parts of other weight than 1.
    """

    step: int
    key: str
    text: str
    num_tokens: int
    seen: str
    cut: str
    weights: tuple[tuple[str, float], ...]

    @property
    def kind(self) -> str:
        return "cut" if self.cut else "whole" if self.num_tokens else "empty"


def shown_captions(config: TrainConfig, num: int) -> Iterator[ShownCaption]:
    """The captions of the first `num` samples in the order of training. Raises: ConfigError, DataError: as training."""
    training_set = read_training_set(config)
    plan = training_set.plan(config)
    maker = BatchMaker(training_set, plan, config, rank=0)
    shown = step = 0
    while shown < num and plan.num_samples:
        for batch in maker.global_batches(step):
            for sample in training_set.take(batch)[: num - shown]:
                yield _shown(config, step + 1, sample.key, maker.caption(sample, step))
                shown += 1
        step += 1


def _shown(config: TrainConfig, step: int, key: str, text: str) -> ShownCaption:
    ids = weighted_tokens(text)[0] if config.weighted_captions else token_ids(text)
    parts = weighted_parts(text) if config.weighted_captions else []
    return ShownCaption(
        step=step,
        key=key,
        text=text,
        num_tokens=len(ids),
        seen=token_text(ids[: config.max_token_length]),
        cut=token_text(ids[config.max_token_length :]),
        weights=tuple((part.strip(), weight) for part, weight in parts if weight != 1),
    )


def caption_lines(captions: Iterable[ShownCaption], config: TrainConfig) -> Iterator[str]:
    """Captions as text for people, and a summary."""
    counts: Counter[str] = Counter()
    limit = config.max_token_length
    for caption in captions:
        counts[caption.kind] += 1
        head = f"step {caption.step}  {caption.key}  [{min(caption.num_tokens, limit)} of {caption.num_tokens} tokens]"
        yield head + ("" if caption.num_tokens else " (empty)")
        if caption.num_tokens:
            yield f"    text: {caption.text}"
            yield f"    seen: {caption.seen}"
        if caption.weights:
            yield "    weights: " + ", ".join(f"{part!r} x {weight:.4g}" for part, weight in caption.weights)
        if caption.cut:
            yield f"    cut:  {caption.cut}"
    kinds = ", ".join(f"{counts[kind]} {kind}" for kind in ("whole", "cut", "empty") if counts[kind])
    yield f"{counts.total()} captions: {kinds}; {limit} tokens at most (max_token_length)"
