"""Which text a picture has in an epoch. docs/training.md tells in which order these act."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from pydantic import Field, field_validator, model_validator

from sdxl_core.config.merge import Category
from sdxl_core.sections import Section


class CaptionOptions(Section):
    caption_separator: str = Field(", ", min_length=1, description="between sentence and tags, and between tags")
    secondary_separator: str = Field(
        "", description="binds tags into one that stays together when shuffled; becomes caption_separator at the end"
    )
    caption_line: Literal["first", "random"] = Field(
        "first", description="of texts with several lines: the first, or another one each epoch"
    )
    enable_wildcard: bool = Field(False, description="of {red|blue} one word, anew each epoch; {{ and }} are braces")
    caption_prefix: str = Field("", description="in front of every caption")
    caption_suffix: str = Field("", description="behind every caption")
    shuffle_caption: bool = Field(False, description="tags in another order each epoch")
    keep_tokens: int = Field(0, ge=0, description="this many first tags stay in front, and are never dropped")
    keep_tokens_separator: str = Field(
        "", description="tags before its first occurrence stay in front, after its second behind; e.g. |||"
    )
    token_warmup_step: float = Field(
        0, ge=0, description="optimizer steps until a caption has all of its tags; below 1: as a share of all steps"
    )
    token_warmup_min: int = Field(1, ge=0, description="how many tags it begins with")
    caption_tag_dropout_rate: float = Field(0.0, ge=0, le=1, description="share of tags left out")
    tag_dropout_by_category: dict[Category, float] = Field(
        {}, description="share of tags left out, by category; replaces caption_tag_dropout_rate for its tags"
    )
    tag_categories: Path | None = Field(
        None,
        description="JSON {category: [tags]} for tag_dropout_by_category; left out: tag_categories.json beside the "
        "metadata, which merge-tags writes from a catalog",
    )
    caption_dropout_rate: float = Field(
        0.0, ge=0, le=1, description="share of captions replaced by the empty one, for classifier-free guidance; 0.1"
    )
    caption_dropout_every_n_epochs: int = Field(0, ge=0, description="each n-th epoch has empty captions only; 0: none")
    weighted_captions: bool = Field(
        False, description="(tag:1.2), (tag) and [tag] weigh what the text encoders make of a tag, as in A1111"
    )
    max_token_length: Literal[75, 150, 225] = Field(75, description="caption tokens the text encoders see")

    @field_validator("tag_dropout_by_category")
    @classmethod
    def rates_are_shares(cls, value: dict[Category, float]) -> dict[Category, float]:
        for category, rate in value.items():
            if not 0 <= rate <= 1:
                raise ValueError(f"{category}: {rate} is no share; it must be in [0, 1]")
        return value

    @model_validator(mode="after")
    def separators_differ(self) -> CaptionOptions:
        for name in ("secondary_separator", "keep_tokens_separator"):
            given = getattr(self, name)
            if given and (given.strip() == "" or given.strip() == self.caption_separator.strip()):
                raise ValueError(f"{name} = {given!r} cannot be told from caption_separator; choose another, e.g. ;;;")
        return self
