"""A folder of pictures with text files beside them."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import orjson
import pyarrow as pa

from sdxl_core.catalog.config import CatalogSource
from sdxl_core.catalog.parts import PartWriter
from sdxl_core.catalog.schema import PART_ROWS
from sdxl_core.catalog.sources.base import STAGE, Piece, Reader, keys_of_paths, rejected, text_columns
from sdxl_core.dataset.listing import ImageFile, ImageListing, key_of, list_images
from sdxl_core.dataset.text import UnreadableText, read_text
from sdxl_core.files import digest_of
from sdxl_core.rejected import Rejected

BATCH = 8_192


def plan(source: CatalogSource, work: Path) -> Iterator[Piece]:
    """List the folder; a piece is a range of its pictures, named in a file of `work`.

    Raises: ConfigError: no such folder.   DataError: no picture in it.
    """
    extensions = (source.tag_extension, source.caption_extension)
    listing = list_images(source.path, recursive=source.recursive, stage=STAGE, text_extensions=extensions)
    refused = [[row.key, row.reason, row.detail] for row in listing.rejected]
    refused += [[name, "no_image", "a text file without a picture"] for name in _lonely_texts(listing, extensions)]
    for start in range(0, max(len(listing.images), 1), PART_ROWS):
        images = listing.images[start : start + PART_ROWS]
        body = orjson.dumps(
            {
                "images": [tuple(image) for image in images],
                **{ext: _stats(source.path, images, listing.texts, ext) for ext in extensions},
                "rejected": refused if start == 0 else [],
            }
        )
        digest = digest_of(body)
        path = work / f"{digest[:32]}.listing.json"
        label = f"pictures {start}-{start + len(images)} of {source.path}"
        yield Piece(digest, label, {"listing": str(path)}, body)


def read(source: CatalogSource, payload: dict[str, Any], writer: PartWriter) -> list[Rejected]:
    """Read the text files of listed pictures."""
    listing = orjson.loads(Path(payload["listing"]).read_bytes())
    refused = [rejected(source.prefix + key, reason, detail) for key, reason, detail in listing["rejected"]]
    images = [ImageFile(*image) for image in listing["images"]]
    reading = {ext: listing[ext] for ext in (source.tag_extension, source.caption_extension)}
    for start in range(0, len(images), BATCH):
        window = slice(start, start + BATCH)
        there = {ext: [size >= 0 for size in stats[0::2][window]] for ext, stats in reading.items()}
        refused += _read_batch(source, images[window], there, writer)
    return refused


def _read_batch(
    source: CatalogSource, images: Sequence[ImageFile], there: dict[str, list[bool]], writer: PartWriter
) -> list[Rejected]:
    refused: list[Rejected] = []
    kept: list[ImageFile] = []
    texts: dict[str, list[str | None]] = {source.tag_extension: [], source.caption_extension: []}
    wanted = {
        ext
        for ext, use in ((source.tag_extension, "tags"), (source.caption_extension, "captions"))
        if use in source.use
    }
    base = os.path.join(source.path, "")
    for number, image in enumerate(images):
        try:
            found = {
                ext: read_text(base + image.key + ext) if ext in wanted and there[ext][number] else None
                for ext in texts
            }
        except UnreadableText as error:
            refused.append(rejected(source.prefix + image.key, error.reason, str(error)))
        except OSError as error:
            detail = f"its text file cannot be read: {error.strerror}"
            refused.append(rejected(source.prefix + image.key, "unreadable_text", detail))
        else:
            kept.append(image)
            for ext, text in found.items():
                texts[ext].append(text)
    if kept:
        columns, tags = text_columns(texts[source.tag_extension], texts[source.caption_extension])
        columns["key"] = keys_of_paths(source, [image.key for image in kept])
        if "images" in source.use:
            columns["image"] = pa.array([image.name for image in kept], pa.string())
            columns["num_bytes"] = pa.array([image.num_bytes for image in kept], pa.int64())
        writer.add(columns, [tags])
    return refused


def _lonely_texts(listing: ImageListing, extensions: Sequence[str]) -> list[str]:
    """Text files that belong to no picture, refused ones included."""
    names = [image.name for image in listing.images] + [row.key for row in listing.rejected]
    keys = {key_of(name) for name in names}
    lonely = sorted(
        name
        for name in listing.texts
        if not any(name.endswith(ext) and name[: -len(ext)] in keys for ext in extensions)
    )
    return [name.encode("utf-8", "backslashreplace").decode() for name in lonely]


def _stats(folder: Path, images: Sequence[ImageFile], texts: frozenset[str], extension: str) -> list[int]:
    """Size and mtime_ns of each picture's text file, one after the other; -1, -1 where there is none."""
    prefix = os.path.join(folder, "")
    numbers: list[int] = []
    for image in images:
        name = image.key + extension
        try:
            status = os.stat(prefix + name) if name in texts else None
        except OSError:
            status = None
        numbers += (status.st_size, status.st_mtime_ns) if status else (-1, -1)
    return numbers


READER = Reader(plan, read)
