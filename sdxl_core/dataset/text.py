"""The text files beside pictures, and the tags in them."""

from __future__ import annotations

import os
import re
from pathlib import Path

MAX_TEXT_BYTES = 1_000_000
_READ_BYTES = 16_384
_BYTE_ORDER_MARK = b"\xef\xbb\xbf"
_ESCAPED = re.compile(r"\\([()\[\]{}])")


class UnreadableText(ValueError):
    """A text file that is none. `reason`: one word for the rejected table; `str(error)`: for people."""

    def __init__(self, reason: str, detail: str) -> None:
        super().__init__(detail)
        self.reason = reason

    def of(self, name: str) -> UnreadableText:
        """The same error, beginning with the file's name."""
        return UnreadableText(self.reason, f"{name} {self}")


def read_text(path: Path | str, states: list[int] | None = None) -> str:
    """A text file as sd-scripts reads it: UTF-8, universal newlines, stripped; a byte-order mark is removed.

    Args:   states: receives the file's size in bytes and mtime_ns as they are before it is read.
    Raises: UnreadableText: not UTF-8, NUL bytes, over 1 MB.   OSError (FileNotFoundError, PermissionError, …).
    """
    handle = os.open(path, os.O_RDONLY)
    try:
        num_wanted = _READ_BYTES
        if states is not None:
            status = os.fstat(handle)
            states += (status.st_size, status.st_mtime_ns)
            num_wanted = min(status.st_size, MAX_TEXT_BYTES) + 1  # the end is seen by what is not there
        data = os.read(handle, num_wanted)
        if len(data) == num_wanted:
            data = _read_on(handle, data)
        return _decoded(data)
    except UnreadableText as error:
        raise error.of(os.path.basename(path)) from None
    finally:
        os.close(handle)


def _read_on(handle: int, data: bytes) -> bytes:
    """What a file holds behind its first bytes; no more than is needed to see that it is too long."""
    while len(data) <= MAX_TEXT_BYTES and (piece := os.read(handle, _READ_BYTES)):
        data += piece
    return data


def decode_text(data: bytes, name: str) -> str:
    """The content of a text file: as `read_text`. `name`: for the error."""
    try:
        return _decoded(data)
    except UnreadableText as error:
        raise error.of(name) from None


def _decoded(data: bytes) -> str:
    if len(data) > MAX_TEXT_BYTES:
        raise UnreadableText("text_too_long", f"is larger than {MAX_TEXT_BYTES} bytes")
    if b"\0" in data:
        raise UnreadableText("unreadable_text", "holds NUL bytes: a binary file, or one cut by a crash")
    try:
        text = data.removeprefix(_BYTE_ORDER_MARK).decode()
    except UnicodeDecodeError as error:
        raise UnreadableText("unreadable_text", f"is not UTF-8 ({error.reason} at byte {error.start})") from None
    if "\r" in text:
        text = text.replace("\r\n", "\n").replace("\r", "\n")
    return text.strip()


def first_line(text: str) -> str:
    """The first line that is not blank: what is trained on (the others are often translations)."""
    return next((line for line in text.splitlines() if line.strip()), "")


def parse_tags(text: str) -> list[str]:
    """The tags of a text: separated by commas or line breaks, stripped, empty ones left out."""
    return [tag for tag in (part.strip() for part in text.replace("\n", ",").split(",")) if tag]


def normalise_tag(tag: str) -> str:
    """A tag in the form it is compared in: lower case, underscores for spaces, escapes of brackets removed."""
    return "_".join(_ESCAPED.sub(r"\1", tag).casefold().replace("_", " ").split())
