"""Which pictures a folder holds, in sd-scripts' order."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

from sdxl_core.errors import ConfigError, DataError
from sdxl_core.files import digest_of
from sdxl_core.refs import SourceRef
from sdxl_core.rejected import Rejected

IMAGE_EXTENSIONS = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".avif")


@dataclass(frozen=True, slots=True)
class ImageFile:
    """A picture as listed. `name`: POSIX path below the source, with extension."""

    name: str
    num_bytes: int
    mtime_ns: int

    @property
    def key(self) -> str:
        """Path below the source without the last extension."""
        return os.path.splitext(self.name)[0]


@dataclass(frozen=True, slots=True, kw_only=True)
class ImageListing:
    """Every picture below `source`, sorted as sd-scripts sorts; `rejected`: names that cannot be used.

    `texts`: name -> (size in bytes, mtime_ns) of every file with one of the text extensions that were asked for.
    """

    source: Path
    images: tuple[ImageFile, ...]
    rejected: tuple[Rejected, ...]
    texts: dict[str, tuple[int, int]]

    @property
    def num_seen(self) -> int:
        return len(self.images) + len(self.rejected)

    def digest(self) -> str:
        """Identity of the listing: names, sizes and modification times."""
        return digest_of(*(f"{image.name}|{image.num_bytes}|{image.mtime_ns}" for image in self.images))

    def ref(self) -> SourceRef:
        return SourceRef(path=self.source, digest=self.digest(), num_images=len(self.images))


def list_images(source: Path, *, recursive: bool, stage: str, text_extensions: tuple[str, ...] = ()) -> ImageListing:
    """List the pictures of a folder with one directory scan.

    Order: by path parts, as sd-scripts' sorted `Path` objects. Of pictures that share folder and stem (1.png, 1.jpg)
    the first is kept: they share their text file and would share their latents.
    Raises: ConfigError: `source` is no folder.   DataError: there is no picture in it.
    """
    if not source.is_dir():
        kind = "is a file, not a folder" if source.exists() else "does not exist"
        raise ConfigError(f"source = {source}: {kind}. Name the folder that holds the pictures.")
    found, texts = _scan(source, recursive=recursive, text_extensions=text_extensions)
    if not found:
        where = "it and its sub-folders" if recursive else "it (sub-folders were not looked into: recursive = false)"
        raise DataError(f"{source}: no pictures in {where}. Looked for {', '.join(IMAGE_EXTENSIONS)}.")
    found.sort(key=lambda image: image.name.split("/"))
    images: list[ImageFile] = []
    rejected: list[Rejected] = []
    owner: dict[str, str] = {}
    for image in found:
        try:
            image.name.encode("utf-8")
        except UnicodeEncodeError:
            shown = image.name.encode("utf-8", "backslashreplace").decode()
            detail = "the file name is not valid UTF-8; rename the file"
            rejected.append(Rejected(stage=stage, key=shown, reason="bad_file_name", detail=detail))
            continue
        first = owner.setdefault(image.key, image.name)
        if first != image.name:
            detail = f"{image.name} shares its name with {first}, which is used"
            rejected.append(Rejected(stage=stage, key=image.name, reason="duplicate_key", detail=detail))
        else:
            images.append(image)
    return ImageListing(source=source, images=tuple(images), rejected=tuple(rejected), texts=texts)


def scan_images(source: Path) -> list[ImageFile]:
    """Every picture below a folder in sd-scripts' order, without any check."""
    found, _ = _scan(source, recursive=True, text_extensions=())
    return sorted(found, key=lambda image: image.name.split("/"))


def _scan(
    source: Path, *, recursive: bool, text_extensions: tuple[str, ...]
) -> tuple[list[ImageFile], dict[str, tuple[int, int]]]:
    found: list[ImageFile] = []
    texts: dict[str, tuple[int, int]] = {}
    todo = [("", os.fspath(source))]
    visited: set[tuple[int, int]] = set()
    while todo:
        prefix, folder = todo.pop()
        status = os.stat(folder)
        if (status.st_dev, status.st_ino) in visited:  # a symbolic link that leads back
            continue
        visited.add((status.st_dev, status.st_ino))
        with os.scandir(folder) as entries:
            for entry in entries:
                name = prefix + entry.name
                if entry.name.lower().endswith(IMAGE_EXTENSIONS) and entry.is_file():
                    stat = entry.stat()
                    found.append(ImageFile(name, stat.st_size, stat.st_mtime_ns))
                elif text_extensions and entry.name.endswith(text_extensions) and entry.is_file():
                    stat = entry.stat()
                    texts[name] = (stat.st_size, stat.st_mtime_ns)
                elif recursive and entry.is_dir():
                    todo.append((name + "/", entry.path))
    return found, texts
