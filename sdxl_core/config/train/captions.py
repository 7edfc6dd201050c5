"""Which text a picture has in an epoch."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from sdxl_core.sections import Section


class CaptionOptions(Section):
    caption_separator: str = Field(", ", min_length=1, description="between sentence and tags, and between tags")
    shuffle_caption: bool = Field(False, description="tags in another order each epoch")
    keep_tokens: int = Field(0, ge=0, description="this many first tags stay in front when shuffling")
    caption_dropout_rate: float = Field(0.0, ge=0, le=1, description="share of captions replaced by the empty one")
    max_token_length: Literal[75, 150, 225] = Field(75, description="caption tokens the text encoders see")
