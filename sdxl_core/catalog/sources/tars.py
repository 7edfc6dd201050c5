"""Tar shards: pictures and text files are found by offset; nothing is unpacked.

Texts may stand in the same tar as their picture, in another of the folder, or in another source: rows of one key are
joined. An index beside a tar (0000.json beside 0000.tar) spares reading its headers.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

import orjson
import pyarrow as pa

from sdxl_core.catalog.config import CatalogSource
from sdxl_core.catalog.parts import PartWriter
from sdxl_core.catalog.schema import PART_ROWS
from sdxl_core.catalog.sources.base import Piece, Reader, keys_of_paths, rejected, text_columns
from sdxl_core.catalog.sources.keys import BadKey, picture_key
from sdxl_core.catalog.sources.paths import file_identity, source_files
from sdxl_core.catalog.tarheaders import BLOCK, End, Member, header_size, scan
from sdxl_core.dataset.listing import IMAGE_EXTENSIONS
from sdxl_core.dataset.text import MAX_TEXT_BYTES, UnreadableText, decode_text
from sdxl_core.errors import DataError
from sdxl_core.files import digest_of
from sdxl_core.rejected import Rejected

_PIECE_BYTES = 2 << 30  # of tars that hold pictures
_TEXT_PIECE_BYTES = PART_ROWS * 2 * BLOCK  # a text file takes a header and a block at least
_BATCH = 8_192
_FILE_SIZE = re.compile(rb'"filesize":\s*(\d+)')


def plan(source: CatalogSource, work: Path) -> Iterator[Piece]:
    """Small tars together, large ones cut between members; headers are read here only of large ones.

    Raises: ConfigError: nothing is there.
    """
    ranges: list[tuple[str, int, int | None, bool]] = []
    identity: list[str | int] = []
    stale: list[str] = []
    room = 0
    for name in source_files(source.path, ".tar", recursive=source.recursive):
        path = source.path / name
        index = _index_of(path)
        if index is not None and not _belongs(index, path):
            stale.append(index.name)
            index = None
        limit = _piece_bytes(path)
        for begin, end, num_bytes in _cut(path, limit):
            if ranges and num_bytes > room:
                yield _piece(source, ranges, identity, stale)
                ranges, identity, stale = [], [], []
            room = (min(room, limit) if ranges else limit) - num_bytes  # few texts next to pictures, too
            ranges.append((name, begin, end, index is not None))
            identity += [name, *file_identity(path), *(file_identity(index) if index else ()), begin, end or -1]
    if ranges:
        yield _piece(source, ranges, identity, stale)


def _piece(
    source: CatalogSource, ranges: list[tuple[str, int, int | None, bool]], identity: list[str | int], stale: list[str]
) -> Piece:
    names = list(dict.fromkeys(name for name, *_ in ranges))
    label = " … ".join(str(source.path / name) for name in dict.fromkeys((names[0], names[-1])))
    if stale:
        label += f" (not used, as made for a tar of another size: {', '.join(stale[:3])}{', …' * (len(stale) > 3)})"
    return Piece(digest_of(*identity), label, {"ranges": ranges})


def _piece_bytes(path: Path) -> int:
    """How much of tars goes into one piece, by what the first members are."""
    with open(path, "rb") as file:
        first = list(islice(scan(file.fileno()), 16))
    return _PIECE_BYTES if any(isinstance(member, Member) and _is_image(member.name) for member in first) else (
        _TEXT_PIECE_BYTES
    )  # fmt: skip


def _cut(path: Path, limit: int) -> Iterator[tuple[int, int | None, int]]:
    """Begin, end (None: the tar's) and bytes of ranges of a tar: all of it, where it is within the limit."""
    begin, count = 0, 0
    num_bytes = path.stat().st_size
    if num_bytes > limit:
        with open(path, "rb") as file:
            for member in scan(file.fileno()):
                if isinstance(member, End):
                    continue
                count += 1
                if count > PART_ROWS or member.header - begin >= limit:
                    yield begin, member.header, member.header - begin
                    begin, count = member.header, 1
    yield begin, None, num_bytes - begin


def read(source: CatalogSource, payload: dict[str, Any], writer: PartWriter) -> list[Rejected]:
    """Read the headers or the index of tars, and the text files in them."""
    refused: list[Rejected] = []
    for name, begin, end, has_index in payload["ranges"]:
        path = source.path / name
        try:
            with open(path, "rb") as file:
                tar = _Tar(source, name, file.fileno(), os.fstat(file.fileno()).st_size)
                listed = _indexed(path, file.fileno(), begin, end) if has_index else None
                tar.take(scan(file.fileno(), begin=begin, end=end) if listed is None else listed)
                tar.write(writer)
                refused += tar.refused
        except OSError as error:
            raise DataError(f"{path}: cannot be read ({error.strerror}).") from error
    return refused


@dataclass(slots=True)
class _Files:
    """The members of one key."""

    image: Member | None = None
    texts: dict[str, Member] = field(default_factory=dict)


class _Tar:
    """The rows of one tar, or of a range of it."""

    def __init__(self, source: CatalogSource, name: str, handle: int, num_bytes: int) -> None:
        self._source, self._name, self._handle, self._num_bytes = source, name, handle, num_bytes
        self._shown = Path(name or source.path).name
        used = {source.tag_extension: "tags", source.caption_extension: "captions"}
        self._text_extensions = tuple(extension for extension, use in used.items() if use in source.use)
        self._rows: dict[str, _Files] = {}
        self.refused: list[Rejected] = []

    def take(self, found: Iterable[Member | End]) -> None:
        for member in found:
            if isinstance(member, End):
                if member.damage:
                    self._refuse(self._shown, "damaged_tar", f"{self._shown}: {member.damage}")
            elif _is_image(member.name) or member.name.endswith(self._text_extensions):
                self._take_file(member)

    def _take_file(self, member: Member) -> None:
        shown = member.name.encode("utf-8", "backslashreplace").decode()
        if member.kind != "file":
            return self._refuse(shown, "not_a_file", f"a {member.kind} in {self._shown}; only whole files can be read")
        if member.offset + member.num_bytes > self._num_bytes:
            there = max(self._num_bytes - member.offset, 0)
            detail = f"{self._shown} ends in the middle of it: {there} of {member.num_bytes} bytes are there"
            return self._refuse(shown, "damaged_tar", detail)
        try:
            member.name.encode()
        except UnicodeEncodeError:
            return self._refuse(shown, "bad_file_name", f"the name in {self._shown} is not valid UTF-8")
        extension = next((ending for ending in self._text_extensions if member.name.endswith(ending)), "")
        try:
            key = picture_key(member.name[: len(member.name) - len(extension)] + (".png" if extension else ""), {})
        except BadKey as error:
            return self._refuse(shown, "bad_key", f"its name in {self._shown}: {error}")
        files = self._rows.setdefault(key, _Files())
        before = files.texts.get(extension) if extension else files.image
        if before is None or before.name == member.name:  # a tar that was added to: the last one counts
            if extension:
                files.texts[extension] = member
            else:
                files.image = member
        if before is not None:
            which = "a later file of that name" if before.name == member.name else f"{before.name}, which is used,"
            self._refuse(shown, "duplicate_key", f"{self._shown} holds {which} too")
        return None

    def write(self, writer: PartWriter) -> None:
        rows = iter(self._rows.items())
        while batch := list(islice(rows, _BATCH)):
            self._write(batch, writer)

    def _write(self, rows: list[tuple[str, _Files]], writer: PartWriter) -> None:
        source = self._source
        kept: list[tuple[str, Member | None]] = []
        texts: dict[str, list[str | None]] = {source.tag_extension: [], source.caption_extension: []}
        for key, files in rows:
            try:
                found = {extension: self._text(files.texts.get(extension)) for extension in texts}
            except UnreadableText as error:
                self._refuse(key, error.reason, str(error))
                continue
            kept.append((key, files.image))
            for extension, text in found.items():
                texts[extension].append(text)
        if not kept:
            return
        columns, tags = text_columns(texts[source.tag_extension], texts[source.caption_extension])
        columns["key"] = keys_of_paths(source, [key for key, _ in kept])
        images = [image for _, image in kept]
        columns["image"] = pa.array([image and image.name for image in images], pa.string())
        columns["tar"] = pa.array([image and self._name for image in images], pa.string())
        columns["offset"] = pa.array([image and image.offset for image in images], pa.int64())
        columns["num_bytes"] = pa.array([image and image.num_bytes for image in images], pa.int64())
        writer.add(columns, [tags])

    def _text(self, member: Member | None) -> str | None:
        if member is None:
            return None
        data = os.pread(self._handle, min(member.num_bytes, MAX_TEXT_BYTES + 1), member.offset)
        return decode_text(data, f"{member.name} in {self._shown}")

    def _refuse(self, key: str, reason: str, detail: str) -> None:
        self.refused.append(rejected(self._source.prefix + key, reason, detail))


def _index_of(path: Path) -> Path | None:
    index = path.with_suffix(".json")
    return index if index.is_file() else None


def _belongs(index: Path, path: Path) -> bool:
    """Whether an index tells the size of the tar that is there."""
    with open(index, "rb") as file:
        told = _FILE_SIZE.search(file.read(4_096))
    if told is not None:
        return int(told[1]) == path.stat().st_size
    try:
        return bool(orjson.loads(index.read_bytes())["filesize"] == path.stat().st_size)
    except (orjson.JSONDecodeError, KeyError, TypeError):
        return False


def _indexed(path: Path, handle: int, begin: int, end: int | None) -> list[Member] | None:
    """The members of a range of a tar as its index tells; None where the tar has no such members at those places."""
    try:
        files = orjson.loads(path.with_suffix(".json").read_bytes())["files"]
        found = [Member(name, at["offset"], at["offset"], at["size"], "file") for name, at in files.items()]
        found.sort(key=lambda member: member.offset)
        for member in (*found[:1], *found[-1:]):
            if header_size(os.pread(handle, BLOCK, member.offset - BLOCK)) != member.num_bytes:
                return None
    except (orjson.JSONDecodeError, KeyError, TypeError, ValueError, AttributeError, OSError):
        return None
    return [member for member in found if begin <= member.offset and (end is None or member.offset < end)]


def _is_image(name: str) -> bool:
    return name.lower().endswith(IMAGE_EXTENSIONS)


READER = Reader(plan, read)
