"""The text files beside pictures, and the tags in them."""

from __future__ import annotations

import os
import re
from collections.abc import MutableSequence, Sequence
from pathlib import Path

MAX_TEXT_BYTES = 1_000_000
LAST_NS = (1 << 63) - 1
_READ_BYTES = 16_384
_AT_ONCE_BYTES = 1 << 22
_BYTE_ORDER_MARK = b"\xef\xbb\xbf"
_RARE = (b"\0", b"\r", _BYTE_ORDER_MARK[:1])  # what asks for more than decoding and stripping
_ESCAPED = re.compile(r"\\([()\[\]{}])")


class UnreadableText(ValueError):
    """A text file that is none. `reason`: one word for the rejected table; `str(error)`: for people."""

    def __init__(self, reason: str, detail: str) -> None:
        super().__init__(detail)
        self.reason = reason

    def of(self, name: str) -> UnreadableText:
        """The same error, beginning with the file's name."""
        return UnreadableText(self.reason, f"{name} {self}")


def state_of(status: os.stat_result) -> tuple[int, int]:
    """A file's size in bytes and mtime_ns, as they fit into 64 bits: file systems can tell years behind 2262."""
    return status.st_size, min(status.st_mtime_ns, LAST_NS)


def read_text(path: Path | str, states: MutableSequence[int] | None = None) -> str:
    """A text file as sd-scripts reads it: UTF-8, universal newlines, stripped; a byte-order mark is removed.

    Args:   states: receives the file's size in bytes and mtime_ns as they are before it is read.
    Raises: UnreadableText: not UTF-8, NUL bytes, over 1 MB.   OSError (FileNotFoundError, PermissionError, …).
    """
    handle = os.open(path, os.O_RDONLY)
    try:
        num_wanted = _READ_BYTES
        if states is not None:
            status = os.fstat(handle)
            states.extend(state_of(status))
            num_wanted = min(status.st_size, MAX_TEXT_BYTES) + 1  # the end is seen by what is not there
        data = os.read(handle, num_wanted)
        if len(data) == num_wanted:
            data = _read_on(handle, data)
        return _decoded(data)
    except UnreadableText as error:
        raise error.of(os.path.basename(path)) from None
    finally:
        os.close(handle)


def read_plain_texts(paths: Sequence[str], *, ahead: bool) -> tuple[list[str | None], list[int]] | None:
    """As `read_text` of some dozens of files at once, for a tenth less.

    Args:   ahead: ask the system for all of them before the first is read.
    Returns: the texts, None in place of a file that is not there, and the files' states, -1, -1 for such a file; or
            None where any of them is anything but a plain text: then they are to be read one by one.
    """
    handles: list[int] = []
    absent: list[int] = []
    try:
        for place, path in enumerate(paths):
            try:
                handles.append(os.open(path, os.O_RDONLY))
            except FileNotFoundError:
                absent.append(place)
        if ahead and hasattr(os, "posix_fadvise"):
            for handle in handles:
                os.posix_fadvise(handle, 0, 0, os.POSIX_FADV_WILLNEED)
        found = list(map(os.fstat, handles))
        sizes = [status.st_size for status in found]
        if max(sizes, default=0) > MAX_TEXT_BYTES or sum(sizes) > _AT_ONCE_BYTES:
            return None
        data = list(map(os.read, handles, [size + 1 for size in sizes]))  # the end is seen by what is not there
        if list(map(len, data)) != sizes:
            return None
        texts: list[str | None] = [*_decoded_all(data)]
    except (OSError, UnreadableText):
        return None
    finally:
        _close_all(handles)
    states = [0] * (2 * len(found))
    states[::2], states[1::2] = sizes, [status.st_mtime_ns for status in found]
    if max(states, default=0) > LAST_NS:
        states = [min(number, LAST_NS) for number in states]
    for place in absent:
        texts.insert(place, None)
        states[2 * place : 2 * place] = (-1, -1)
    return texts, states


def _close_all(handles: Sequence[int]) -> None:
    """Close files; those with consecutive numbers, as the system gives them, by one call."""
    if not handles:
        return
    start, stop = min(handles), max(handles) + 1
    for other in [*sorted(set(range(start, stop)).difference(handles)), stop]:
        os.closerange(start, other)
        start = other + 1


def _decoded_all(data: Sequence[bytes]) -> list[str]:
    """As `_decoded` of each, none of them too long. Raises: UnreadableText: one is damaged."""
    joined = b"".join(data)
    if any(byte in joined for byte in _RARE):
        return list(map(_decoded, data))
    try:
        return list(map(str.strip, map(bytes.decode, data)))
    except UnicodeDecodeError as error:
        raise UnreadableText("unreadable_text", f"is not UTF-8 ({error.reason})") from None


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
