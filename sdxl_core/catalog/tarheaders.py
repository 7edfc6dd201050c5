"""What is in a tar file and where: its headers are read, its data is skipped. Formats: V7, ustar, GNU, pax."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from typing import NamedTuple

BLOCK = 512
_HELPERS = b"LKxgX"  # headers that tell about the next member
_WITHOUT_DATA = b"123456"  # links, devices, folders
_PAX_RECORD = re.compile(rb"(\d+) ([^=]+)=")
_MAX_HELPER_BYTES = 1 << 20  # a name is never that long: the tar is damaged
_NEAR_BYTES = 32_768  # smaller members are read past, larger ones are skipped
_WINDOW_BYTES = 131_072


class Member(NamedTuple):
    """A file, link or sparse file in a tar.

    `header`: first byte of the first header that tells about it.   `offset`: first byte of its data.
    `name`: with lone surrogates where it is not UTF-8.
    """

    name: str
    header: int
    offset: int
    num_bytes: int
    kind: str  # "file", "link", "sparse"


class End(NamedTuple):
    """Where a tar ended. `damage`: "" for a whole one, else what is wrong with it there, for people."""

    offset: int
    damage: str


class Damaged(ValueError):
    """No header where there should be one."""


def scan(handle: int, *, begin: int = 0, end: int | None = None) -> Iterator[Member | End]:
    """The members whose `header` is in [begin, end), and at last an End.

    Names, offsets and sizes are those that Python's `tarfile` tells. A member whose data is cut is given too: it
    reaches behind the end of the file.
    Args:   handle: an open file.   begin: 0, or the `header` of a member.
    """
    window = _Window(handle)
    position = begin
    shared: dict[str, bytes] = {}
    try:
        while end is None or position < end:
            found, position = _next(window, position, shared)
            if found is not None:
                yield found
    except EOFError:
        yield End(position, "")
    except Damaged as damage:
        yield End(position, str(damage))
    else:
        yield End(position, "")


def header_size(block: bytes) -> int:
    """The size that a header tells. Raises: Damaged: it is none."""
    try:
        return _checked(block, 0)[1]
    except EOFError:
        raise Damaged("no header") from None


def _next(window: _Window, begin: int, shared: dict[str, bytes]) -> tuple[Member | None, int]:
    """The member that begins at a byte, None for a folder or device, and where the next one begins.

    Raises: EOFError: the end mark.   Damaged.
    """
    position, own, long_name = begin, dict(shared), b""
    while True:
        block = window.read(position, BLOCK)
        kind, size = _checked(block, position)
        if kind not in _HELPERS:
            break
        text = window.read(position + BLOCK, min(size, _MAX_HELPER_BYTES))
        if len(text) < size:
            raise Damaged(f"a name that begins at byte {position} is cut or damaged")
        if kind == b"L":
            long_name = text.split(b"\0")[0]
        elif kind == b"g":
            shared |= _pax(text)
            own = shared | own
        elif kind != b"K":
            own |= _pax(text)
        position += BLOCK + _padded(size)
        begin = position if kind == b"g" else begin
    offset = position + BLOCK
    if own.get("size", b"").isdigit():
        size = int(own["size"])
    if kind == b"S":
        extended = block[482]
        while extended:
            extended = window.read(offset, BLOCK)[504]
            offset += BLOCK
    after = offset + (0 if kind in _WITHOUT_DATA else _padded(size))
    window.skip_hint(after - offset)
    name = own["path"].rstrip(b"/") if "path" in own else long_name or _name(block)
    member = Member(name.decode("utf-8", "surrogateescape"), begin, offset, size, "file")
    if kind == b"S" or any(key.startswith("GNU.sparse.") for key in own):
        return member._replace(kind="sparse"), after
    if kind in b"12":
        return member._replace(kind="link"), after
    is_file = kind in b"07" or (kind == b"\0" and not block[:100].rstrip(b"\0").endswith(b"/"))
    return (member if is_file else None), after


def _checked(block: bytes, position: int) -> tuple[bytes, int]:
    """Kind and size that a header tells. Raises: EOFError, Damaged."""
    if not block:
        raise Damaged("it has no end mark: it was cut, and what came after is missing")
    if len(block) < BLOCK:
        raise Damaged(f"it ends at byte {position + len(block)}, in the middle of a header")
    if not any(block):
        raise EOFError
    unsigned = sum(block) - sum(block[148:156]) + 8 * 32
    told = _number(block[148:156], position)
    if told != unsigned:
        high = sum(byte > 127 for byte in block) - sum(byte > 127 for byte in block[148:156])
        if told != unsigned - 256 * high:  # some old tars sum signed bytes
            raise Damaged(f"there is no header at byte {position}")
    size = _number(block[124:136], position)
    if size < 0:
        raise Damaged(f"the header at byte {position} tells a size of {size}")
    return block[156:157], size


def _number(field: bytes, position: int) -> int:
    """A number in octal digits or, marked by its first byte, in base 256."""
    if field[0] in (0o200, 0o377):
        return int.from_bytes(field[1:], "big") - (256 ** (len(field) - 1) if field[0] == 0o377 else 0)
    try:
        return int(field.split(b"\0")[0].strip() or b"0", 8)
    except ValueError:
        raise Damaged(f"there is no header at byte {position}") from None


def _name(block: bytes) -> bytes:
    name, prefix = block[:100].split(b"\0")[0], block[345:500].split(b"\0")[0]
    return prefix + b"/" + name if prefix and block[156:157] not in b"LKS" else name


def _pax(text: bytes) -> dict[str, bytes]:
    """The records "LENGTH KEYWORD=VALUE\\n" of a pax header."""
    records, position = dict[str, bytes](), 0
    while (match := _PAX_RECORD.match(text, position)) and int(match[1]):
        end = position + int(match[1])
        records[match[2].decode("utf-8", "surrogateescape")] = text[match.end() : end - 1]
        position = end
    return records


def _padded(num_bytes: int) -> int:
    return -(-num_bytes // BLOCK) * BLOCK


class _Window:
    """Reads of a few hundred bytes that go forward: where members are small, many from one call of the system."""

    def __init__(self, handle: int) -> None:
        self._handle = handle
        self._start = 0
        self._data = b""
        self._ahead = 4_096

    def read(self, position: int, num_bytes: int) -> bytes:
        """Fewer bytes only at the end of the file."""
        begin = position - self._start
        if begin < 0 or begin + num_bytes > len(self._data):
            self._start, begin = position, 0
            self._data = os.pread(self._handle, max(num_bytes, self._ahead), position)
        return self._data[begin : begin + num_bytes]

    def skip_hint(self, num_bytes: int) -> None:
        self._ahead = _WINDOW_BYTES if num_bytes < _NEAR_BYTES else 4_096
