"""Metadata JSON: meta_cap.json, meta_cap_dd.json, meta_lat.json, or any object of objects."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from sdxl_core.catalog.config import CatalogSource
from sdxl_core.catalog.jsonsplit import Layout, entries, layout_of, ranges
from sdxl_core.catalog.parts import PartWriter
from sdxl_core.catalog.sources.base import Piece, Reader
from sdxl_core.catalog.sources.objects import BadRow, Rows, parsed
from sdxl_core.catalog.sources.paths import file_identity, opened, source_files
from sdxl_core.dataset.text import UnreadableText
from sdxl_core.files import digest_of
from sdxl_core.rejected import Rejected

PIECE_BYTES = 16 << 20
_KEY = re.compile(rb'"((?:[^"\\]|\\.){1,300})"\s*:')


def plan(source: CatalogSource, work: Path) -> Iterator[Piece]:
    """Cut every file into byte ranges of whole entries.

    Raises: ConfigError: nothing is there.   DataError: a file that is no JSON object.
    """
    for name in source_files(source.path, ".json", recursive=source.recursive):
        path = source.path / name
        with opened(path) as file:
            layout = layout_of(file, str(path))
            for begin, end in ranges(file, layout, range_bytes=PIECE_BYTES):
                digest = digest_of(name, *file_identity(path), begin, end)
                payload = {"file": name, "begin": begin, "end": end, "mark": layout.mark.decode()}
                yield Piece(digest, f"bytes {begin}-{end} of {path}", payload)


def read(source: CatalogSource, payload: dict[str, Any], writer: PartWriter) -> list[Rejected]:
    """Read the entries of a range."""
    path = source.path / payload["file"]
    rows = Rows(source, writer)
    with opened(path) as file:
        is_last = payload["end"] == file.seek(0, 2)
        file.seek(payload["begin"])
        data = file.read(payload["end"] - payload["begin"])
    previous: bytes | None = None
    for entry in entries(data, Layout(payload["begin"], payload["mark"].encode())):
        if previous is not None:
            _take(rows, previous, path)
        previous = entry
    if previous is not None and not is_last:
        _take(rows, previous, path)
    elif previous is not None:
        _take_last(rows, previous, path)
    rows.flush()
    return rows.refused


def _take_last(rows: Rows, entry: bytes, path: Path) -> None:
    """The last entry of a file, with the brace that closes the object: the last byte, unless the file was cut."""
    if entry == b"}":
        return
    try:
        parsed(b"{" + entry.removesuffix(b"}") + b"}")
    except (BadRow, UnreadableText):
        detail = f"{path} was cut, or its last entry is not valid JSON; entries may be missing"
        rows.refuse(path.name, "damaged_json", detail)
        _take(rows, entry, path)
    else:
        _take(rows, entry.removesuffix(b"}"), path)


def _take(rows: Rows, entry: bytes, path: Path) -> None:
    try:
        found = parsed(b"{" + entry + b"}")
    except (BadRow, UnreadableText) as error:
        key = _KEY.match(entry)
        shown = key[1] if key else entry[:60]
        reason = error.reason if isinstance(error, UnreadableText) else "bad_row"
        rows.refuse(shown.decode("utf-8", "backslashreplace"), reason, f"in {path}: {error}")
        return
    for name, value in found.items():
        rows.add(name, value, place=path.name)


READER = Reader(plan, read)
