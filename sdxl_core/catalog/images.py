"""The bytes of a catalog's pictures: read where they are, out of folders and tars."""

from __future__ import annotations

import io
import os
from collections import OrderedDict
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO, NamedTuple, Self

import numpy as np

from sdxl_core.catalog.records import Catalog, Ints
from sdxl_core.catalog.schema import IMAGE_COLUMNS
from sdxl_core.errors import DataError
from sdxl_core.roots import data_roots, is_allowed

_MAX_OPEN = 32
_RECORDS_AT_ONCE = 4_096
_HEAD_BYTES = 4_096  # read at a time where only the beginning of a picture is wanted


class ImagePlace(NamedTuple):
    """Where a picture's bytes are: a file, or a range of a tar. `tar_mtime_ns`: when that was last written, -1 where it
    is not known."""

    path: Path
    name: str
    offset: int
    num_bytes: int
    in_tar: bool
    tar_mtime_ns: int = -1


def image_places(catalog: Catalog, records: Ints) -> list[ImagePlace | None]:
    """Where the pictures of records are, in their order; None for a record that no source has a picture of."""
    rows = catalog.take(np.asarray(records), [*IMAGE_COLUMNS, "source"]).to_pylist()
    roots = [source.path for source in catalog.sources]
    return [None if row["image"] is None else place_of(row, roots[row["source"]]) for row in rows]


def place_of(row: Mapping[str, Any], root: Path) -> ImagePlace:
    """Where a row's picture is. Args: row: IMAGE_COLUMNS; it has one.   root: path of the row's source."""
    return ImagePlace(
        path=root / (row["image"] if row["tar"] is None else row["tar"]),
        name=row["image"],
        offset=row["offset"] or 0,
        num_bytes=row["num_bytes"],
        in_tar=row["tar"] is not None,
    )


class ImageReader:
    """Reads pictures by place; tars stay open for the next. Safe in forked processes: nothing seeks."""

    def __init__(self) -> None:
        self._open: OrderedDict[Path, int] = OrderedDict()
        self._roots = data_roots()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        while self._open:
            os.close(self._open.popitem()[1])

    def read(self, place: ImagePlace) -> bytes:
        """The picture's bytes, undecoded.

        Raises: DataError: its file is gone, unreadable, outside the data roots, or not as long as when the catalog was
                built.
        """
        with self._errors(place):
            if place.in_tar:
                data = os.pread(self._handle(place.path), place.num_bytes, place.offset)
            else:
                data = place.path.read_bytes()
        _check_size(place, len(data))
        return data

    @contextmanager
    def opened(self, place: ImagePlace) -> Iterator[BinaryIO]:
        """The picture as an open file, of which only that is read which is asked for.

        Raises: as `read`, be it of what is done with the file.
        """
        with self._errors(place):
            if place.in_tar:
                handle = self._handle(place.path)
                _check_size(place, min(place.num_bytes, os.fstat(handle).st_size - place.offset))
                yield io.BufferedReader(_Range(handle, place.offset, place.num_bytes), _HEAD_BYTES)
            else:
                with open(place.path, "rb", buffering=_HEAD_BYTES) as file:
                    _check_size(place, os.fstat(file.fileno()).st_size)
                    yield file

    @contextmanager
    def _errors(self, place: ImagePlace) -> Iterator[None]:
        if not is_allowed(place.path, self._roots):
            raise DataError(f"{place.path}: leads out of the data roots of this machine, so it is not read.")
        try:
            yield
        except OSError as error:
            raise DataError(f"{place.path}: cannot be read ({error.strerror}), and {place.name} is there.") from error

    def _handle(self, path: Path) -> int:
        handle = self._open.pop(path, None)
        self._open[path] = os.open(path, os.O_RDONLY) if handle is None else handle
        if len(self._open) > _MAX_OPEN:
            os.close(self._open.popitem(last=False)[1])
        return self._open[path]


def _check_size(place: ImagePlace, num_bytes: int) -> None:
    if num_bytes != place.num_bytes:
        raise DataError(
            f"{place.path}: {place.name} has {num_bytes} bytes, the catalog says {place.num_bytes}. The collection "
            f"changed; build the catalog again, which reads only what changed."
        )


class _Range(io.RawIOBase):
    """A range of an open file, as a file."""

    def __init__(self, handle: int, offset: int, num_bytes: int) -> None:
        self._handle, self._offset, self._num_bytes = handle, offset, num_bytes
        self._position = 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        start = {io.SEEK_SET: 0, io.SEEK_CUR: self._position, io.SEEK_END: self._num_bytes}[whence]
        self._position = max(0, start + offset)
        return self._position

    def readinto(self, buffer: Any) -> int:
        view = memoryview(buffer)[: max(0, self._num_bytes - self._position)]
        count = os.preadv(self._handle, [view], self._offset + self._position) if len(view) else 0
        self._position += count
        return count


def read_image_bytes(catalog: Catalog, records: Ints) -> Iterator[bytes]:
    """The undecoded bytes of the records' pictures, one after the other.

    Raises: DataError: a record without a picture; as `ImageReader.read`.
    """
    with ImageReader() as reader:
        for start in range(0, len(records), _RECORDS_AT_ONCE):
            some = records[start : start + _RECORDS_AT_ONCE]
            for record, place in zip(some, image_places(catalog, some), strict=True):
                if place is None:
                    key = catalog.take(np.asarray([record]), ["key"])["key"][0].as_py()
                    raise DataError(
                        f"{catalog.path}: no source has a picture of {key}. Leave it out, or add its source."
                    )
                yield reader.read(place)
