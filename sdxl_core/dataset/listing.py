"""Which pictures a folder holds, in sd-scripts' order."""

from __future__ import annotations

import errno
import os
from bisect import bisect_left, bisect_right
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import chain, islice, repeat
from pathlib import Path
from typing import NamedTuple, Self

import numpy as np

from sdxl_core.errors import ConfigError, DataError
from sdxl_core.files import digest_of
from sdxl_core.refs import SourceRef
from sdxl_core.rejected import Rejected
from sdxl_core.roots import data_roots, is_allowed

IMAGE_EXTENSIONS = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".avif")
NAMES_A_CHUNK = 4_096


class ImageFile(NamedTuple):
    """A picture as listed. `name`: POSIX path below the source, with extension."""

    name: str
    num_bytes: int
    mtime_ns: int

    @property
    def key(self) -> str:
        """Path below the source without the last extension."""
        return key_of(self.name)


@dataclass(slots=True)
class Names:
    """Many names in order, joined as UTF-8 by some thousands: a few bytes a name more than they are written with."""

    _chunks: list[bytes] = field(default_factory=list)
    _ends: list[int] = field(default_factory=list)  # how many names are in a chunk and in those before

    @classmethod
    def of(cls, names: Sequence[str]) -> Self:
        packed = cls()
        for start in range(0, len(names), NAMES_A_CHUNK):
            packed.add(names[start : start + NAMES_A_CHUNK])
        return packed

    def add(self, names: Sequence[str]) -> None:
        if names:
            self._chunks.append("\0".join(names).encode("utf-8", "surrogateescape"))
            self._ends.append(len(self) + len(names))

    def __len__(self) -> int:
        return self._ends[-1] if self._ends else 0

    def __iter__(self) -> Iterator[str]:
        return chain.from_iterable(chunk.decode("utf-8", "surrogateescape").split("\0") for chunk in self._chunks)

    def part(self, start: int, stop: int) -> list[str]:
        """The names from `start` to before `stop`."""
        first = bisect_right(self._ends, start)
        last = bisect_left(self._ends, stop) + 1
        names = list(Names(self._chunks[first:last], self._ends[first:last]))
        before = self._ends[first - 1] if first else 0
        return names[start - before : stop - before]


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

    def may_have(self, keys: Sequence[str], extension: str) -> list[bool]:
        """For each picture whether its text may be opened to see if it is there."""
        if self.has_odd_texts:
            texts = self.texts
            return [key + extension in texts for key in keys]
        return [extension in self.text_endings] * len(keys)


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
        for name in _in_order(scan.dangling)
    ]
    rejected += [
        Rejected(stage=stage, key=_shown(name), reason="outside_roots", detail="a link out of the data roots")
        for name in _in_order(scan.outside)
    ]
    names = _in_order(scan.images)
    spelled_well = all(map(str.isascii, names)) or all(map(_is_utf8, names))
    if not spelled_well or _may_share_stems(names):
        names, refused = _without_refused(names, stage)
        rejected += refused
    return NameListing(
        source=source,
        names=Names.of(names),
        rejected=tuple(rejected),
        text_names=scan.texts,
        text_endings=scan.text_endings,
        has_odd_texts=scan.has_odd_texts,
    )


def keys_of(names: Sequence[str]) -> list[str]:
    """`key_of` of every picture; their names have a dot in the last part."""
    stems = [name.rpartition(".")[0] for name in names]
    return [stem if stem and stem[-1] != "/" else name for stem, name in zip(stems, names, strict=True)]


def _may_share_stems(names: Sequence[str]) -> bool:
    """False: no two pictures have one key. 64-bit hashes are compared, 8 bytes a picture."""
    extension = names[0][names[0].rfind(".") :] if names else ""
    if all(map(str.endswith, names, repeat(extension))):
        return False
    hashes = np.fromiter((hash(name.rpartition(".")[0]) for name in names), np.int64, len(names))
    hashes.sort()
    return bool((hashes[1:] == hashes[:-1]).any())


def _without_refused(names: Sequence[str], stage: str) -> tuple[list[str], list[Rejected]]:
    """The names that can be used, and why the others cannot."""
    used: list[str] = []
    refused: list[Rejected] = []
    owner: dict[str, str] = {}
    for name, key in zip(names, keys_of(names), strict=True):
        first = owner.setdefault(key, name)
        if not (name.isascii() or _is_utf8(name)):
            detail = "the file name is not valid UTF-8; rename the file"
            refused.append(Rejected(stage=stage, key=_shown(name), reason="bad_file_name", detail=detail))
        elif first is not name:
            detail = f"{name} shares its name with {first}, which is used"
            refused.append(Rejected(stage=stage, key=name, reason="duplicate_key", detail=detail))
        else:
            used.append(name)
    return used, refused


def list_images(source: Path, *, recursive: bool, stage: str, text_extensions: tuple[str, ...] = ()) -> ImageListing:
    """As `list_names`, with the pictures' sizes and times. A picture that vanishes meanwhile was never there."""
    listing = list_names(source, recursive=recursive, stage=stage, text_extensions=text_extensions)
    images = _with_sizes(source, listing.names)
    return ImageListing(source=source, images=tuple(images), rejected=listing.rejected, texts=listing.texts)


def scan_images(source: Path) -> list[ImageFile]:
    """Every picture below a folder in sd-scripts' order, without any check of names. Raises as `list_names`."""
    _check_source(source)
    return _with_sizes(source, _in_order(_scan(source, recursive=True, text_extensions=()).images))


def key_of(name: str) -> str:
    """A file's path without its last extension, as `pathlib` divides it: `.png` is all stem, `a.b.png` is `a.b`."""
    dot = name.rfind(".")
    return name[:dot] if dot > name.rfind("/") + 1 else name


class _Scan:
    """What a walk has found so far; names are POSIX paths below the source."""

    def __init__(self, text_extensions: tuple[str, ...]) -> None:
        self.images: list[str] = []
        self.dangling: list[str] = []
        self.outside: list[str] = []
        self.texts = Names()
        self.has_odd_texts = False
        self._roots = data_roots()
        self._extensions = text_extensions
        self._endings: set[str] = set()
        self._new_texts: list[str] = []

    @property
    def text_endings(self) -> frozenset[str]:
        return frozenset(self._endings)

    def add_files(self, prefix: str, names: Sequence[str]) -> None:
        """Take the pictures and texts from names of regular files of one folder."""
        texts = [name for name in names if name.endswith(self._extensions)]
        images = [name for name in names if name.endswith(IMAGE_EXTENSIONS)]
        if len(texts) + len(images) != len(names):
            images = [name for name in names if name.lower().endswith(IMAGE_EXTENSIONS)]
        self.images += [prefix + name for name in images] if prefix else images
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
            self.images += [prefix + name] * is_image
            self.add_texts([prefix + name] * (is_text and not is_image))
        elif entry.is_dir():
            return True
        else:
            self.dangling += [prefix + name] * is_image
        return False

    def add_texts(self, names: Sequence[str]) -> None:
        self._new_texts += names
        for extension in self._extensions:
            if extension not in self._endings and any(map(str.endswith, names, repeat(extension))):
                self._endings.add(extension)
        if len(self._new_texts) >= NAMES_A_CHUNK // 2:
            self.pack()

    def pack(self) -> None:
        self.texts.add(self._new_texts)
        self._new_texts.clear()


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
                while some := list(islice(entries, NAMES_A_CHUNK)):
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
    scan.pack()
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


def _in_order(names: list[str]) -> list[str]:
    """Sorted in place by path parts: `b/1` comes before `b-c/1`, though "-" sorts before "/"."""
    if any("/" in name for name in names):
        names.sort(key=lambda name: name.replace("/", "\0"))  # what sorts before all a name may have
    else:
        names.sort()
    return names


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
