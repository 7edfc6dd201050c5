"""The entries of one large JSON object, byte range by byte range: never more than a range is in memory.

json.dumps(indent=…) begins each entry on a line of its own, indented once and in quotes, and no line of a value looks
like that (JSON escapes line breaks within texts); so such a file can be entered anywhere. Any other layout is passed
over once, to find where its entries begin.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import BinaryIO, NamedTuple

from sdxl_core.errors import DataError

_BLOCK_BYTES = 1 << 20
BYTE_ORDER_MARK = b"\xef\xbb\xbf"
_OPENING = re.compile(rb"\s*\{")
_INDENTED = re.compile(rb"\s*\{\r?\n([ \t]+)\"")
# A whole text, a text that has not ended yet, what opens and closes, and what parts entries.
_TOKEN = re.compile(rb'"[^"\\]*+(?:\\.[^"\\]*+)*+(?:"|(\Z|\\\Z))|[{}\[\],]', re.DOTALL)


class Layout(NamedTuple):
    """`begin`: the byte behind the opening brace.   `mark`: what stands before each entry, b"" where it may be
    anything."""

    begin: int
    mark: bytes


def layout_of(file: BinaryIO, name: str) -> Layout:
    """How a file is laid out. Raises: DataError: it is no JSON object."""
    file.seek(0)
    head = file.read(65_536)
    start = len(BYTE_ORDER_MARK) if head.startswith(BYTE_ORDER_MARK) else 0
    opening = _OPENING.match(head, start)
    if opening is None:
        shown = head[start : start + 30].decode("utf-8", "backslashreplace")
        raise DataError(
            f'{name}: one JSON object was expected, such as {{"123": {{"tags": "1girl"}}}}; it begins {shown!r}. '
            f"A file with one object a line must end in .jsonl, or be listed with kind = 'jsonl'."
        )
    indented = _INDENTED.match(head, start)
    return Layout(opening.end(), b"\n" + indented[1] + b'"' if indented else b"")


def ranges(file: BinaryIO, layout: Layout, *, range_bytes: int) -> Iterator[tuple[int, int]]:
    """Byte ranges of about `range_bytes` with whole entries, together all up to the end of the file."""
    begin, num_bytes = layout.begin, file.seek(0, 2)
    bounds = find_marks(file, layout.mark, begin, range_bytes) if layout.mark else _entry_starts(file, begin)
    for bound in bounds:
        if bound - begin >= range_bytes:
            yield begin, bound
            begin = bound
    if begin < num_bytes:
        yield begin, num_bytes


def find_marks(file: BinaryIO, mark: bytes, begin: int, step: int) -> Iterator[int]:
    """Where the first mark stands at or behind every `step` bytes: places where the file can be cut."""
    position = begin + step
    while True:
        file.seek(position)
        data = file.read(_BLOCK_BYTES)
        found = data.find(mark)
        if found >= 0:
            yield position + found
            position += max(found, 1) + step
        elif len(data) < _BLOCK_BYTES:
            return
        else:
            position += len(data) - len(mark) + 1


def entries(data: bytes, layout: Layout) -> Iterator[bytes]:
    """The entries in a range's bytes, `"key": value`, with what follows the last one in its range.

    Commas between them are taken off; a closing brace is not, for only a parser can tell whether it is the object's.
    """
    if layout.mark:
        head, *parts = data.split(layout.mark)
        if head.strip():
            yield head.strip()
        for part in parts:
            yield b'"' + part.rstrip().removesuffix(b",")
        return
    begin = 0
    for bound in (*_commas(data), len(data)):
        entry = data[begin:bound].strip().removesuffix(b",")
        begin = bound
        if entry:
            yield entry


def _commas(data: bytes) -> Iterator[int]:
    """Behind each comma between entries."""
    depth = 0
    for token in _TOKEN.finditer(data):
        depth, is_bound = _walk(depth, token[0])
        if is_bound:
            yield token.end()


def _entry_starts(file: BinaryIO, begin: int) -> Iterator[int]:
    """As `_commas`, over a file, block by block."""
    depth, rest, position = 0, b"", begin
    while True:
        file.seek(position + len(rest))
        block = file.read(_BLOCK_BYTES)
        if not block:
            return
        data = rest + block
        used = len(data)
        for token in _TOKEN.finditer(data):
            if token[1] is not None:  # a text that goes on in the next block
                used = token.start()
                break
            depth, is_bound = _walk(depth, token[0])
            if is_bound:
                yield position + token.end()
        position, rest = position + used, data[used:]


def _walk(depth: int, token: bytes) -> tuple[int, bool]:
    """The depth behind a token, and whether it is a comma between entries."""
    if token in b"{[":
        return depth + 1, False
    if token in b"}]":
        return depth - 1, False
    return depth, token == b"," and depth == 0
