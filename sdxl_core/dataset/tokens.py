"""CLIP's byte-pair tokens of a text. No torch here, so that whoever only counts starts quickly and may fork."""

from __future__ import annotations

from functools import cache
from typing import Any


@cache
def _vocabulary() -> Any:
    from instant_clip_tokenizer import Tokenizer

    return Tokenizer()


def token_ids(caption: str) -> list[int]:
    """A caption's byte-pair ids, without begin and end marks."""
    ids: list[int] = _vocabulary().encode(caption.encode("utf-8", "replace").decode("utf-8"))
    return ids


def token_text(ids: list[int]) -> str:
    """What ids stand for: lower case, a space behind each word and sign. The reverse of `token_ids`, for people."""
    text: str = _vocabulary().decode(ids)
    return text.strip()


def count_tokens(caption: str) -> int:
    """How many of the 75, 150 or 225 places a caption takes."""
    return len(token_ids(caption))
