"""JSONL: one picture a line, with sd-scripts' names (image_path, caption, tags, image_size) or a booru's."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from sdxl_core.catalog.config import CatalogSource
from sdxl_core.catalog.jsonsplit import BYTE_ORDER_MARK, find_marks
from sdxl_core.catalog.parts import PartWriter
from sdxl_core.catalog.sources.base import Piece, Reader
from sdxl_core.catalog.sources.objects import BadRow, Rows, parsed
from sdxl_core.catalog.sources.paths import file_identity, opened, source_files
from sdxl_core.dataset.text import UnreadableText
from sdxl_core.files import digest_of
from sdxl_core.rejected import Rejected

PIECE_BYTES = 16 << 20


def plan(source: CatalogSource, work: Path) -> Iterator[Piece]:
    """Cut every file into byte ranges of whole lines. Raises: ConfigError: nothing is there."""
    for name in source_files(source.path, ".jsonl", recursive=source.recursive):
        path = source.path / name
        with opened(path) as file:
            begin, num_bytes = 0, file.seek(0, 2)
            for bound in (*(at + 1 for at in find_marks(file, b"\n", 0, PIECE_BYTES)), num_bytes):
                if bound > begin:
                    digest = digest_of(name, *file_identity(path), begin, bound)
                    payload = {"file": name, "begin": begin, "end": bound}
                    yield Piece(digest, f"bytes {begin}-{bound} of {path}", payload)
                begin = bound


def read(source: CatalogSource, payload: dict[str, Any], writer: PartWriter) -> list[Rejected]:
    """Read the lines of a range; blank ones are nothing."""
    path = source.path / payload["file"]
    rows = Rows(source, writer)
    with opened(path) as file:
        file.seek(payload["begin"])
        data = file.read(payload["end"] - payload["begin"])
    position = payload["begin"]
    for line in data.split(b"\n"):
        text = (line.removeprefix(BYTE_ORDER_MARK) if position == 0 else line).strip()
        if text:
            place = f"{path.name} byte {position}"
            try:
                entry = parsed(text)
            except (BadRow, UnreadableText) as error:
                reason = error.reason if isinstance(error, UnreadableText) else "bad_row"
                rows.refuse(place, reason, str(error))
            else:
                rows.add(None, entry, place=place)
        position += len(line) + 1
    rows.flush()
    return rows.refused


READER = Reader(plan, read)
