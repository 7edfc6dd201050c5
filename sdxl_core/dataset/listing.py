"""Which pictures a folder holds, in sd-scripts' order."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import islice, repeat
from pathlib import Path
from typing import NamedTuple

import numpy as np

from sdxl_core.dataset.names import Names
from sdxl_core.errors import ConfigError, DataError
from sdxl_core.files import digest_of
from sdxl_core.refs import SourceRef
from sdxl_core.rejected import Rejected
from sdxl_core.roots import data_roots, is_allowed

IMAGE_EXTENSIONS = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".avif")
ENTRIES_AT_ONCE = 4_096


class ImageFile(NamedTuple):
    """A picture as listed. `name`: POSIX path below the source, with extension."""

    name: str
    num_bytes: int
    mtime_ns: int

    @property
    def key(self) -> str:
        """Path below the source without the last extension."""
        return key_of(self.name)


@dataclass(frozen=True, slots=True, kw_only=True)
class NameListing:
    """Names of the pictures below `source`, sorted as sd-scripts sorts; `rejected`: names that cannot be used.

    `names` and `text_names` are POSIX paths below the source; `text_names`: every file with one of the asked text
    extensions, in no order.   `text_endings`: which of the extensions they have.   `has_odd_texts`: something
    else has the name of a text: a folder, a pipe, a link out of the data roots.
    """

    source: Path
    names: Names
    rejected: tuple[Rejected, ...]
    text_names: Names
    text_endings: frozenset[str]
    has_odd_texts: bool

    @property
    def num_seen(self) -> int:
        return len(self.names) + len(self.rejected)

    @property
    def texts(self) -> frozenset[str]:
        """`text_names`, made anew each time."""
        return frozenset(self.text_names)

    def may_have(self, names: Sequence[str], extension: str) -> Sequence[bool]:
        """For each picture whether its text may be opened to see if it is there."""
        if self.has_odd_texts:
            texts = self.texts
            return [key + extension in texts for key in keys_of(names)]
        return [extension in self.text_endings] * len(names)


@dataclass(frozen=True, slots=True, kw_only=True)
class ImageListing:
    """As NameListing, with size and modification time of every picture."""

    source: Path
    images: tuple[ImageFile, ...]
    rejected: tuple[Rejected, ...]
    texts: frozenset[str]

    @property
    def num_seen(self) -> int:
        return len(self.images) + len(self.rejected)

    @property
    def digest(self) -> str:
        """Identity of the listing: names, sizes and modification times."""
        return digest_of(*(f"{image.name}|{image.num_bytes}|{image.mtime_ns}" for image in self.images))

    def ref(self) -> SourceRef:
        return SourceRef(path=self.source, digest=self.digest, num_images=len(self.images))


def list_names(source: Path, *, recursive: bool, stage: str, text_extensions: tuple[str, ...] = ()) -> NameListing:
    """List the pictures of a folder and, on the way, its text files: one directory scan, no file is touched.

    Order: by path parts, as sd-scripts' sorted `Path` objects. Of pictures that share folder and stem (1.png, 1.jpg)
    the first is kept: they share their text file and would share their latents.
    Args:   stage: goes into the rejected rows.
    Raises: ConfigError: `source` is no folder.   DataError: no picture in it, or a sub-folder that cannot be read.
    """
    _check_source(source)
    scan = _scan(source, recursive=recursive, text_extensions=text_extensions)
    if not (scan.images or scan.dangling or scan.outside):
        where = "it and its sub-folders" if recursive else "it (sub-folders were not looked into: recursive = false)"
        raise DataError(f"{source}: no pictures in {where}. Looked for {', '.join(IMAGE_EXTENSIONS)}, in any case.")
    rejected = [
        Rejected(stage=stage, key=_shown(name), reason="not_a_file", detail="a link to nothing, or no regular file")
        for name in Names.of(scan.dangling).in_order()
    ]
    rejected += [
        Rejected(stage=stage, key=_shown(name), reason="outside_roots", detail="a link out of the data roots")
        for name in Names.of(scan.outside).in_order()
    ]
    names = scan.images.in_order()
    del scan.images
    doubled = _doubled_keys(names)
    if doubled or not (all(map(str.isascii, names)) or all(map(_is_utf8, names))):
        names, refused = _without_refused(names, stage, doubled)
        rejected += refused
    return NameListing(
        source=source,
        names=names,
        rejected=tuple(rejected),
        text_names=scan.texts,
        text_endings=scan.text_endings,
        has_odd_texts=scan.has_odd_texts,
    )


def keys_of(names: Sequence[str]) -> list[str]:
    """`key_of` of every picture; their names have a dot in the last part."""
    stems = [name.rpartition(".")[0] for name in names]
    return [stem if stem and stem[-1] != "/" else name for stem, name in zip(stems, names, strict=True)]


def _doubled_keys(names: Names) -> frozenset[int]:
    """Hashes of the keys that more than one picture may have. 64-bit hashes are compared, 8 bytes a picture."""
    first = next(iter(names), "")
    extension = first[first.rfind(".") :]
    if all(map(str.endswith, names, repeat(extension))) and not names.has_last_part(extension):
        return frozenset()  # names differ, and so do they without the same ending
    hashes = np.fromiter((hash(key_of(name)) for name in names), np.int64, len(names))
    hashes.sort()
    return frozenset(hashes[1:][hashes[1:] == hashes[:-1]].tolist())


def _without_refused(names: Names, stage: str, doubled: frozenset[int]) -> tuple[Names, list[Rejected]]:
    """The names that can be used, and why the others cannot. `doubled`: as `_doubled_keys` gives them."""
    used = Names()
    refused: list[Rejected] = []
    owner: dict[str, str] = {}
    for name in names:
        key = key_of(name)
        first = owner.setdefault(key, name) if hash(key) in doubled else name
        if not (name.isascii() or _is_utf8(name)):
            detail = "the file name is not valid UTF-8; rename the file"
            refused.append(Rejected(stage=stage, key=_shown(name), reason="bad_file_name", detail=detail))
        elif first is not name:
            detail = f"{name} shares its name with {first}, which is used"
            refused.append(Rejected(stage=stage, key=name, reason="duplicate_key", detail=detail))
        else:
            used.add([name])
    return used, refused


def list_images(source: Path, *, recursive: bool, stage: str, text_extensions: tuple[str, ...] = ()) -> ImageListing:
    """As `list_names`, with the pictures' sizes and times. A picture that vanishes meanwhile was never there."""
    listing = list_names(source, recursive=recursive, stage=stage, text_extensions=text_extensions)
    images = _with_sizes(source, listing.names)
    return ImageListing(source=source, images=tuple(images), rejected=listing.rejected, texts=listing.texts)


def scan_images(source: Path) -> list[ImageFile]:
    """Every picture below a folder in sd-scripts' order, without any check of names. Raises as `list_names`."""
    _check_source(source)
    return _with_sizes(source, _scan(source, recursive=True, text_extensions=()).images.in_order())


def key_of(name: str) -> str:
    """A file's path without its last extension, as `pathlib` divides it: `.png` is all stem, `a.b.png` is `a.b`."""
    dot = name.rfind(".")
    return name[:dot] if dot > name.rfind("/") + 1 else name


class _Scan:
    """What a walk has found so far; names are POSIX paths below the source."""

    def __init__(self, text_extensions: tuple[str, ...]) -> None:
        self.images = Names()
        self.dangling: list[str] = []
        self.outside: list[str] = []
        self.texts = Names()
        self.has_odd_texts = False
        self._roots = data_roots()
        self._extensions = text_extensions
        self._endings: set[str] = set()

    @property
    def text_endings(self) -> frozenset[str]:
        return frozenset(self._endings)

    def add_files(self, prefix: str, names: Sequence[str]) -> None:
        """Take the pictures and texts from names of regular files of one folder."""
        texts = [name for name in names if name.endswith(self._extensions)]
        images = [name for name in names if name.endswith(IMAGE_EXTENSIONS)]
        if len(texts) + len(images) != len(names):
            images = [name for name in names if name.lower().endswith(IMAGE_EXTENSIONS)]
        self.images.add([prefix + name for name in images] if prefix else images)
        self.add_texts([prefix + name for name in texts] if prefix else texts)

    def add_odd(self, prefix: str, entry: os.DirEntry[str]) -> bool:
        """Take what is no regular file itself. Returns whether it is a folder to look into."""
        name = entry.name
        is_image, is_text = name.lower().endswith(IMAGE_EXTENSIONS), name.endswith(self._extensions)
        self.has_odd_texts = self.has_odd_texts or is_text
        if self._roots and entry.is_symlink() and not is_allowed(entry.path, self._roots):
            self.outside += [prefix + name] * is_image
        elif _leads_nowhere(entry):
            self.dangling += [prefix + name] * is_image
        elif entry.is_file():
            self.images.add([prefix + name] * is_image)
            self.add_texts([prefix + name] * (is_text and not is_image))
        elif entry.is_dir():
            return True
        else:
            self.dangling += [prefix + name] * is_image
        return False

    def add_texts(self, names: Sequence[str]) -> None:
        self.texts.add(names)
        for extension in self._extensions:
            if extension not in self._endings and any(map(str.endswith, names, repeat(extension))):
                self._endings.add(extension)


def _scan(source: Path, *, recursive: bool, text_extensions: tuple[str, ...]) -> _Scan:
    """Walk a folder. Links to folders are followed, each folder once and under its own name where it has one below
    the source: so loops end, and the result does not depend on the order of directory entries. Links that leave the
    data roots are not followed: pictures are listed as `outside`, texts and folders are not there."""
    scan = _Scan(text_extensions)
    folders, links = [""], list[str]()
    visited: set[tuple[int, int]] = set()
    while folders or links:
        if not folders:
            links.sort(reverse=True)
            link = links.pop()
            if Path(os.path.realpath(source)).is_relative_to(os.path.realpath(source / link)):
                continue  # leads back up: everything it adds would lie outside the source
            folders.append(link)
        prefix = folders.pop()
        try:
            status = os.stat(source / prefix)
            if (status.st_dev, status.st_ino) in visited:
                continue
            visited.add((status.st_dev, status.st_ino))
            with os.scandir(source / prefix) as entries:
                while some := list(islice(entries, ENTRIES_AT_ONCE)):
                    names = [entry.name for entry in some if entry.is_file(follow_symlinks=False)]
                    scan.add_files(prefix, names)
                    if len(names) == len(some):
                        continue
                    for entry in some:
                        if not entry.is_file(follow_symlinks=False) and scan.add_odd(prefix, entry) and recursive:
                            (links if entry.is_symlink() else folders).append(f"{prefix}{entry.name}/")
        except OSError as error:
            raise DataError(
                f"{source / prefix}: this folder cannot be read ({error.strerror}), so its pictures are unknown. "
                f"Change its permissions, or move it out of {source}."
            ) from error
    return scan


def _leads_nowhere(entry: os.DirEntry[str]) -> bool:
    """A link that leads to itself, or through too many others."""
    try:
        entry.is_file()
    except OSError as error:
        if error.errno == errno.ELOOP:
            return True
        raise
    return False


def _with_sizes(source: Path, names: Iterable[str]) -> list[ImageFile]:
    images: list[ImageFile] = []
    prefix = os.path.join(source, "")
    for name in names:
        try:
            status = os.stat(prefix + name)
        except FileNotFoundError:
            continue
        except OSError as error:
            raise DataError(f"{prefix}{name}: cannot be looked at ({error.strerror}).") from error
        images.append(ImageFile(name, status.st_size, status.st_mtime_ns))
    return images


def _check_source(source: Path) -> None:
    if not _is_utf8(str(source)):
        raise ConfigError(f"source = {_shown(str(source))}: the path is not valid UTF-8; rename the folder.")
    if not source.is_dir():
        kind = "is a file, not a folder" if source.exists() else "does not exist"
        raise ConfigError(f"source = {source}: {kind}. Name the folder that holds the pictures.")


def _is_utf8(text: str) -> bool:
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True


def _shown(name: str) -> str:
    return name.encode("utf-8", "backslashreplace").decode()
