"""Which text a sample has in an epoch: sentence and tags joined, tags shuffled, now and then nothing at all."""

from __future__ import annotations

from dataclasses import dataclass

from sdxl_core.dataset.text import first_line
from sdxl_core.training.randomness import permutation, uniform


@dataclass(frozen=True, slots=True, kw_only=True)
class CaptionRules:
    """The caption settings of a run; the words are TrainOptions'."""

    separator: str
    shuffle: bool
    keep_tokens: int
    dropout_rate: float
    seed: int


def caption_text(sentence: str, tags: str, rules: CaptionRules, *, epoch: int, key: str) -> str:
    """The text of sample `key` in `epoch`: a pure function of its arguments.

    Of a text with several lines the first that is not blank counts (the others are often translations). The sentence,
    if there is one, comes first and whole, then the separator, then the tags. Without shuffling the
    tags stay as written; with it they are split at the separator, the first `keep_tokens` stay in front.
    With probability `dropout_rate` the text is empty, which is what classifier-free guidance needs.
    """
    if rules.dropout_rate and uniform("caption dropout", rules.seed, epoch, key) < rules.dropout_rate:
        return ""
    sentence, tags = first_line(sentence), first_line(tags)
    if rules.shuffle:
        tags = _shuffled(tags, rules, epoch=epoch, key=key)
    return rules.separator.join(part for part in (sentence, tags) if part)


def _shuffled(tags: str, rules: CaptionRules, *, epoch: int, key: str) -> str:
    words = [word.strip() for word in tags.split(rules.separator.strip() or rules.separator)]
    words = [word for word in words if word]
    kept, moved = words[: rules.keep_tokens], words[rules.keep_tokens :]
    order = permutation(len(moved), "caption shuffle", rules.seed, epoch, key)
    return rules.separator.join([*kept, *(moved[i] for i in order)])
