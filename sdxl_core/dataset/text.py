"""The text files beside pictures, and the tags in them."""

from __future__ import annotations

import os
import re
from pathlib import Path

MAX_TEXT_BYTES = 1_000_000
_ESCAPED = re.compile(r"\\([()\[\]{}])")


class UnreadableText(ValueError):
    """A text file that is none. `reason`: one word for the rejected table; `str(error)`: for people."""

    def __init__(self, reason: str, detail: str) -> None:
        super().__init__(detail)
        self.reason = reason


def read_text(path: Path | str) -> str:
    """A text file as sd-scripts reads it: UTF-8, universal newlines, stripped; a byte-order mark is removed.

    Raises: UnreadableText: not UTF-8, NUL bytes, over 1 MB.   FileNotFoundError.
    """
    handle = os.open(path, os.O_RDONLY)
    try:
        data = os.read(handle, MAX_TEXT_BYTES + 1)
    finally:
        os.close(handle)
    name = os.path.basename(path)
    if len(data) > MAX_TEXT_BYTES:
        raise UnreadableText("text_too_long", f"{name} is larger than {MAX_TEXT_BYTES} bytes")
    if b"\0" in data:
        raise UnreadableText("unreadable_text", f"{name} holds NUL bytes: a binary file, or one cut by a crash")
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise UnreadableText("unreadable_text", f"{name} is not UTF-8 ({error.reason} at byte {error.start})") from None
    if "\r" in text:
        text = text.replace("\r\n", "\n").replace("\r", "\n")
    return text.strip()


def parse_tags(text: str) -> list[str]:
    """The tags of a text: separated by commas or line breaks, stripped, empty ones left out."""
    return [tag for tag in (part.strip() for part in text.replace("\n", ",").split(",")) if tag]


def normalise_tag(tag: str) -> str:
    """A tag in the form it is compared in: lower case, underscores for spaces, escapes of brackets removed."""
    return "_".join(_ESCAPED.sub(r"\1", tag).casefold().replace("_", " ").split())
