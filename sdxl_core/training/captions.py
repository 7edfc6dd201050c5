"""Which text a sample has in an epoch: sentence and tags joined, tags shuffled and dropped, now and then nothing.

Everything is a pure function of (seed, epoch, key, step): each choice has its own random numbers, so switching one on
changes no other.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

from sdxl_core.config.train.captions import CaptionOptions
from sdxl_core.dataset.text import first_line, normalise_tag
from sdxl_core.training.randomness import Key, permutation, random_words, uniform

_WILDCARD = re.compile(r"\{([^{}]+)\}")
_OPEN, _CLOSE = "\x12", "\x13"  # stand for {{ and }} while wildcards are chosen


@dataclass(frozen=True, slots=True, kw_only=True)
class CaptionRules:
    """The caption settings of a run.

    warmup_steps: until a caption has all of its tags.   tag_rates: dropout rate of each tag whose category has one, by
    the tag in normalised form.
    """

    options: CaptionOptions
    seed: int
    warmup_steps: int = 0
    tag_rates: Mapping[str, float] = field(default_factory=dict)


def caption_text(sentence: str, tags: str, rules: CaptionRules, *, epoch: int, key: str, step: int) -> str:
    """The text of sample `key` in `epoch` (from 0) at optimizer step `step` (from 0).

    The sentence, if there is one, comes first and whole, then the separator, then the tags; they stay as written
    unless something is to be done to tags. docs/training.md has the order in which the options act.
    """
    options, where = rules.options, (rules.seed, epoch, key)
    if _is_dropped(options, epoch, where):
        return ""
    sentence, tags = (_line(text, options, where, part) for part, text in (("sentence", sentence), ("tags", tags)))
    tags = _chosen_tags(tags, rules, where, step)
    text = options.caption_separator.join(part for part in (sentence, tags) if part)
    prefix, suffix = (
        _wildcards(text, options, (*where, part))
        for part, text in (("prefix", options.caption_prefix), ("suffix", options.caption_suffix))
    )
    text = " ".join(part for part in (prefix, text, suffix) if part)
    return text.replace(options.secondary_separator, options.caption_separator) if options.secondary_separator else text


def _is_dropped(options: CaptionOptions, epoch: int, where: tuple[Key, ...]) -> bool:
    every = options.caption_dropout_every_n_epochs
    if every and (epoch + 1) % every == 0:
        return True
    rate = options.caption_dropout_rate
    return bool(rate) and uniform("caption dropout", *where) < rate


def _line(text: str, options: CaptionOptions, where: tuple[Key, ...], part: str) -> str:
    """One line of a text, its wildcards chosen."""
    if options.caption_line == "random":
        lines = [line for line in text.splitlines() if line.strip()]
        text = lines[int(uniform("caption line", *where, part) * len(lines))] if lines else ""
    return _wildcards(first_line(text), options, (*where, part))


def _wildcards(text: str, options: CaptionOptions, where: tuple[Key, ...]) -> str:
    """`{a|b}` as a or b; `{{` and `}}` as braces."""
    if not options.enable_wildcard or not ("{" in text or "}" in text):
        return text
    numbers = iter(range(len(text)))

    def choose(match: re.Match[str]) -> str:
        words = match[1].split("|")
        return words[int(uniform("wildcard", *where, next(numbers)) * len(words))]

    hidden = text.replace("{{", _OPEN).replace("}}", _CLOSE)
    return _WILDCARD.sub(choose, hidden).replace(_OPEN, "{").replace(_CLOSE, "}")


def _chosen_tags(text: str, rules: CaptionRules, where: tuple[Key, ...], step: int) -> str:
    """The tags of a sample: fixed ones in front (and behind), of the others the first, some dropped, shuffled."""
    options = rules.options
    is_warming = step < rules.warmup_steps
    drops = options.caption_tag_dropout_rate or rules.tag_rates
    marked = options.keep_tokens_separator and options.keep_tokens_separator in text
    if not (options.shuffle_caption or is_warming or drops or marked):
        return text
    if marked:
        front, flexible, behind = _divided(text, options)
    else:
        words = list(_words(text, options))
        front, flexible, behind = words[: options.keep_tokens], words[options.keep_tokens :], []
    if is_warming:
        flexible = flexible[: _num_warm(len(flexible), rules, step)]
    if drops:
        flexible = _undropped(flexible, rules, where)
    if options.shuffle_caption:
        flexible = [flexible[i] for i in permutation(len(flexible), "caption shuffle", *where)]
    return options.caption_separator.join([*front, *flexible, *behind])


def _divided(text: str, options: CaptionOptions) -> tuple[list[str], list[str], list[str]]:
    """The tags before the first keep_tokens_separator, up to the second, and behind."""
    parts = [list(_words(part, options)) for part in text.split(options.keep_tokens_separator, 2)]
    return parts[0], parts[1], parts[2] if len(parts) == 3 else []


def _words(text: str, options: CaptionOptions) -> Iterator[str]:
    separator = options.caption_separator
    words = (word.strip() for word in text.split(separator.strip() or separator))
    return (word for word in words if word)


def _num_warm(num_tags: int, rules: CaptionRules, step: int) -> int:
    """How many tags a caption has at `step`: from token_warmup_min to all of them, linearly."""
    least = min(rules.options.token_warmup_min, num_tags)
    return least + step * (num_tags - least) // rules.warmup_steps


def _undropped(words: list[str], rules: CaptionRules, where: tuple[Key, ...]) -> list[str]:
    """Each tag with its own chance, which does not depend on the others."""
    chances = random_words(len(words), "tag dropout", *where) / 2.0**64
    default = rules.options.caption_tag_dropout_rate
    rates = (rules.tag_rates.get(normalise_tag(word), default) if rules.tag_rates else default for word in words)
    return [word for word, chance, rate in zip(words, chances, rates, strict=True) if chance >= rate]
