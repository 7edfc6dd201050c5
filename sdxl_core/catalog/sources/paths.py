"""The files of a source."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from sdxl_core.errors import ConfigError, DataError


def source_files(path: Path, ending: str, *, recursive: bool) -> list[str]:
    """Names below `path` of the files with this ending, sorted by parts; [""] where `path` itself is the file.

    Raises: ConfigError: nothing is there.
    """
    if path.is_file():
        return [""]
    if not path.is_dir():
        raise ConfigError(f"source = {path}: does not exist. Name a {ending} file or a folder of them.")
    found = [file for file in (path.rglob("*") if recursive else path.iterdir()) if file.suffix.lower() == ending]
    names = [file.relative_to(path).as_posix() for file in found if file.is_file()]
    if not names:
        raise ConfigError(f"source = {path}: no {ending} file in it.")
    return sorted(names, key=lambda name: name.split("/"))


def file_identity(path: Path) -> tuple[int, int]:
    """Size and modification time."""
    status = path.stat()
    return status.st_size, status.st_mtime_ns


@contextmanager
def opened(path: Path) -> Iterator[BinaryIO]:
    """A file of a source. Raises: ConfigError: it is gone.   DataError: it cannot be read."""
    try:
        with open(path, "rb") as file:
            yield file
    except FileNotFoundError as error:
        raise ConfigError(f"{path}: the file is not there any more.") from error
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror}). Check its permissions and the disk.") from error
