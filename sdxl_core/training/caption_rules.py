"""The caption rules of a run, from its config and from what is known of tags."""

from __future__ import annotations

from pathlib import Path

import orjson

from sdxl_core.config import TrainConfig
from sdxl_core.dataset.metadata import TAG_CATEGORIES
from sdxl_core.dataset.text import normalise_tag
from sdxl_core.errors import ConfigError, DataError
from sdxl_core.training.captions import CaptionRules
from sdxl_core.training.schedules import steps_of


def caption_rules(config: TrainConfig, *, total_steps: int) -> CaptionRules:
    """Raises: ConfigError, DataError: dropout by category, but no categories are known."""
    return CaptionRules(
        options=config,
        seed=config.seed,
        warmup_steps=steps_of(config.token_warmup_step, total_steps=total_steps),
        tag_rates=tag_rates(config),
    )


def plain_rules(config: TrainConfig) -> CaptionRules:
    """The rules of captions that are whole and always the same, for measuring."""
    off = {
        "caption_line": "first", "shuffle_caption": False, "token_warmup_step": 0, "caption_tag_dropout_rate": 0.0,
        "caption_dropout_rate": 0.0, "caption_dropout_every_n_epochs": 0,
    }  # fmt: skip
    return CaptionRules(options=config.model_copy(update=off), seed=config.seed)


def categories_path(config: TrainConfig) -> Path:
    """Where the categories of tags are looked for."""
    return config.tag_categories or config.metadata.with_name(TAG_CATEGORIES)


def tag_rates(config: TrainConfig) -> dict[str, float]:
    """Dropout rate of each tag whose category has one, by normalised tag; about 150 bytes of memory a tag.

    Raises: ConfigError: no file of categories, or none of the asked-for ones in it.   DataError: it is damaged.
    """
    rates = config.tag_dropout_by_category
    if not rates:
        return {}
    path = categories_path(config)
    try:
        categories = orjson.loads(path.read_bytes())
        known = {name: tags for name, tags in categories.items() if tags}
        result = {normalise_tag(tag): rate for name, rate in rates.items() for tag in known.get(name, [])}
    except FileNotFoundError as error:
        raise ConfigError(
            f"tag_dropout_by_category: which category a tag has is not known, because there is no {path}. merge-tags "
            f"writes it when it merges a catalog (sdxl-flows catalog reads categories from booru dumps). Or write one "
            f'yourself, {{"artist": ["…"], "character": ["…"]}}, and name it as tag_categories.'
        ) from error
    except (orjson.JSONDecodeError, AttributeError, TypeError) as error:
        raise DataError(
            f"{path}: not a JSON object of lists of tags ({error}). Run merge-tags again, or correct the file."
        ) from error
    lacking = [name for name in rates if name not in known]
    if lacking:
        raise ConfigError(
            f"tag_dropout_by_category: {path} has no tags of {' and '.join(lacking)}; it knows "
            f"{', '.join(sorted(known)) or 'no category at all'}. Leave {lacking[0]} out, or name another file as "
            f"tag_categories."
        )
    return result


def caption_warning(config: TrainConfig) -> str | None:
    """What should be said about the captions of a run before it starts."""
    if config.caption_dropout_rate or config.caption_dropout_every_n_epochs:
        return None
    return (
        "caption_dropout_rate is 0: the model never sees an empty caption, though every picture drawn with "
        "classifier-free guidance uses its answer to one. 0.05 to 0.1 is usual."
    )
