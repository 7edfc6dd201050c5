"""Pictures' bytes, one after the other, with the disk told what comes next."""

from __future__ import annotations

import os
from collections import OrderedDict, deque
from collections.abc import Iterable, Iterator
from pathlib import Path
from types import TracebackType
from typing import Self

from sdxl_core.catalog.images import ImagePlace
from sdxl_core.errors import DataError
from sdxl_core.images.decode import BadPicture
from sdxl_core.latents.engine.records import Picture
from sdxl_core.roots import data_roots, is_allowed

AHEAD = 16
MAX_OPEN_TARS = 32
MAX_FILE_BYTES = 2**31


class Reader:
    """Reads places; tars stay open. A place that was announced is opened already and on its way from the disk."""

    def __init__(self) -> None:
        self._tars: OrderedDict[Path, int] = OrderedDict()
        self._announced: dict[ImagePlace, int] = {}
        self._roots = data_roots()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for handle in [*self._tars.values(), *self._announced.values()]:
            os.close(handle)
        self._tars.clear()
        self._announced.clear()

    def announce(self, place: ImagePlace) -> None:
        """Ask the system to read a place ahead of its `read`."""
        try:
            if place.in_tar:
                os.posix_fadvise(self._tar(place.path), place.offset, place.num_bytes, os.POSIX_FADV_WILLNEED)
            elif place not in self._announced and is_allowed(place.path, self._roots):
                handle = os.open(place.path, os.O_RDONLY | os.O_CLOEXEC)
                self._announced[place] = handle
                os.posix_fadvise(handle, 0, 0, os.POSIX_FADV_WILLNEED)
        except OSError:
            return  # `read` meets it again, and says so

    def read(self, place: ImagePlace) -> bytes:
        """A picture's bytes.

        Raises: BadPicture: missing_image, unreadable, outside_roots, too_large.
                DataError: the tar is another than was planned with: other pictures may be at its offsets.
        """
        if not is_allowed(place.path, self._roots):
            raise BadPicture("outside_roots", f"{place.path} leads out of the data roots of this machine")
        try:
            if place.in_tar:
                handle = self._tar(place.path)
                data = os.pread(handle, place.num_bytes, place.offset)
                if place.tar_mtime_ns not in (-1, os.fstat(handle).st_mtime_ns):
                    raise DataError(
                        f"{place.path}: was written again since the catalog was built, so other pictures may be where "
                        f"{place.name} was. Build the catalog again, then run the same command again."
                    )
                if len(data) != place.num_bytes:
                    raise BadPicture("unreadable", f"{place.path} ends within {place.name}: the tar was cut")
                return data
            return self._read_file(place)
        except FileNotFoundError as error:
            detail = f"{place.name} was there when the run was planned, and is gone"
            raise BadPicture("missing_image", detail) from error
        except OSError as error:
            raise BadPicture("unreadable", f"{place.name} cannot be read: {error.strerror}") from error

    def _read_file(self, place: ImagePlace) -> bytes:
        handle = self._announced.pop(place, None)
        if handle is None:
            handle = os.open(place.path, os.O_RDONLY | os.O_CLOEXEC)
        with open(handle, "rb", buffering=0) as file:
            num_bytes = os.fstat(handle).st_size
            if num_bytes > MAX_FILE_BYTES:
                raise BadPicture("too_large", f"{place.name} has {num_bytes} bytes; that is no picture")
            return file.readall()

    def _tar(self, path: Path) -> int:
        handle = self._tars.pop(path, None)
        if handle is None:
            if not is_allowed(path, self._roots):
                raise PermissionError(1, "leads out of the data roots")
            handle = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        self._tars[path] = handle
        if len(self._tars) > MAX_OPEN_TARS:
            os.close(self._tars.popitem(last=False)[1])
        return handle


def read_in_order(pictures: Iterable[Picture], reader: Reader) -> Iterator[tuple[Picture, bytes | BadPicture]]:
    """Every picture's bytes, or why it has none, in order; the next few are announced to the disk."""
    ahead: deque[Picture] = deque()
    for picture in pictures:
        reader.announce(picture.place)
        ahead.append(picture)
        if len(ahead) > AHEAD:
            yield _read(ahead.popleft(), reader)
    while ahead:
        yield _read(ahead.popleft(), reader)


def _read(picture: Picture, reader: Reader) -> tuple[Picture, bytes | BadPicture]:
    try:
        return picture, reader.read(picture.place)
    except BadPicture as error:
        return picture, error
