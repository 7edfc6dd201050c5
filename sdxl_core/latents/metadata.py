"""A metadata JSON as a stream: some thousand entries at a time, whatever its size."""

from __future__ import annotations

import json
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import msgspec

from sdxl_core.catalog.jsonsplit import Layout, entries, layout_of, ranges
from sdxl_core.errors import ConfigError, DataError

RANGE_BYTES = 4 << 20
_INDENTED = b'\n  "'  # before each entry in what json.dumps(indent=2) writes
_MORE = b',\n    "train_resolution": [\n      %d,\n      %d\n    ]\n  }'


class Entry(msgspec.Struct):
    """What is asked of an entry; anything else in it is passed over."""

    tags: str | None = None
    caption: str | None = None
    train_resolution: Any = None


class Block(NamedTuple):
    """Consecutive entries. `texts`: each one's bytes, `"key": {…}`, as they stand in the file."""

    keys: list[str]
    entries: list[Entry]
    texts: list[bytes]
    is_indented: bool

    def with_resolution(self, number: int, width_px: int, height_px: int) -> bytes:
        """An entry as json.dumps(indent=2) writes it, with its train_resolution, without what stands around it."""
        text = self.texts[number]
        if (
            self.is_indented
            and self.entries[number].train_resolution is None
            and text.endswith(b"\n  }")
            and text.isascii()
            and b'"train_resolution"' not in text
            and not text[:-4].rstrip().endswith(b"{")
        ):
            return b"  " + text[:-4] + _MORE % (width_px, height_px)
        entry = json.loads(b"{" + text + b"}")
        ((key, value),) = entry.items()
        whole = json.dumps({key: value | {"train_resolution": [width_px, height_px]}}, indent=2)
        return whole[2:-2].encode("ascii")


_decoder = msgspec.json.Decoder(dict[str, Entry])


def blocks(path: Path) -> Iterator[Block]:
    """All entries in order; a key that stands there twice comes twice.

    Raises: ConfigError: no such file.   DataError: not JSON, cut short, or not metadata; what was expected is named.
    """
    try:
        file = open(path, "rb")  # noqa: SIM115
    except FileNotFoundError as error:
        raise ConfigError(f"{path}: there is no such metadata file. `sdxl-flows merge-tags` makes it.") from error
    except IsADirectoryError as error:
        raise ConfigError(f"{path}: this is a folder; name the metadata JSON in it.") from error
    num_entries = 0
    with file:
        layout = layout_of(file, str(path))
        num_bytes = file.seek(0, 2)
        for begin, end in ranges(file, layout, range_bytes=RANGE_BYTES):
            file.seek(begin)
            data = file.read(end - begin).rstrip()
            if end == num_bytes:
                if not data.endswith(b"}"):
                    raise _not_json(path, "its closing brace is missing: it was cut short")
                data = data[:-1].rstrip()
            block = _block(path, data.removesuffix(b","), layout)
            num_entries += len(block.keys)
            if block.keys:
                yield block
    if not num_entries:
        raise DataError(f"{path}: holds no picture. Make it again with `sdxl-flows merge-tags`, or name another.")


def _block(path: Path, data: bytes, layout: Layout) -> Block:
    is_indented = layout.mark == _INDENTED
    found = _decoded(path, data)
    texts = list(entries(data, layout))
    if len(texts) == len(found):
        keys = list(found)
        if not is_indented or all(text.startswith(b'"') for text in texts):
            return Block(keys, list(found.values()), texts, is_indented)
    # a key that stands there twice, or a line within a value that looks like the beginning of an entry
    texts = list(entries(data, Layout(0, b"")))
    pairs = [next(islice(_decoded(path, text).items(), 1)) for text in texts]
    return Block([key for key, _ in pairs], [entry for _, entry in pairs], texts, False)


def _decoded(path: Path, data: bytes) -> dict[str, Entry]:
    try:
        found = _decoder.decode(b"{" + data + b"}")
    except msgspec.ValidationError as error:
        raise DataError(
            f"{path}: an entry is none of a metadata file of ours or sd-scripts': {error}. It is one object: picture "
            f"key -> object, with tags and caption texts."
        ) from error
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise _not_json(path, error) from error
    for key, entry in found.items():
        size = entry.train_resolution
        if size is not None and not _is_size(size):
            raise DataError(
                f"{path}: the entry of {key!r} has a train_resolution that is not [width, height]. This is not a "
                f"metadata file of ours or sd-scripts'."
            )
    return found


def _is_size(size: Any) -> bool:
    return isinstance(size, list) and len(size) == 2 and all(type(side) is int and side > 0 for side in size)


def _not_json(path: Path, problem: object) -> DataError:
    return DataError(f"{path}: not valid JSON ({problem}). Make it again with `sdxl-flows merge-tags`.")
