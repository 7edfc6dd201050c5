"""A cache that is nothing but files: found as sd-scripts finds them, by the names of pictures, in both namings."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np

from sdxl_core.latents.rows import LEDGER_FOLDER

PICTURE_ENDINGS = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".avif", ".jxl")
TEXT_ENCODER, PACKED = "_te_outputs.npz", "packed"
_SIZED = re.compile(r"(?P<stem>.+)_(?P<width>\d{4,})x(?P<height>\d{4,})_sdxl\.npz")
_FULL_PATH = re.compile(r"([A-Za-z]:)?[\\/]")


class BareCache:
    """Files below a folder: `F.npz`, or `F_{width:04d}x{height:04d}_sdxl.npz` with the source picture's size.

    Folders of the second kind are listed once, 16 bytes a file; files written later are then not found.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._sizes = lru_cache(maxsize=None)(SizesByName)

    def find(self, key: str) -> Path | None:
        """The file of a picture, None where there is none.

        Args:   key: as in a metadata JSON: a name, a path below the folder, or a full path, whose file may also be in
                the folder itself (what sd-scripts' preparation does); with or without the picture's ending.
        """
        stem = key[: -len(os.path.splitext(key)[1])] if key.lower().endswith(PICTURE_ENDINGS) else key
        stems = [self.folder / stem]
        if _FULL_PATH.match(stem):
            stems.append(self.folder / re.split(r"[\\/]", stem)[-1])
        for path in stems:
            plain = path.with_name(f"{path.name}.npz")
            if plain.is_file():
                return plain
        for path in stems:
            for width, height in self._sizes(path.parent).of(path.name):
                sized = path.with_name(f"{path.name}_{width:04d}x{height:04d}_sdxl.npz")
                if sized.is_file():  # no, where another name has the same hash
                    return sized
        return None

    def files(self) -> Iterator[tuple[str, str]]:
        """(key, path) of every file of latents, folder by folder in order of names; a key is a path below the folder
        without endings. Packed files of a set of ours are none of them.
        """
        is_ours = (self.folder / LEDGER_FOLDER).is_dir()
        for folder, folders, names in os.walk(self.folder):
            below = os.path.relpath(folder, self.folder)
            prefix = "" if below == "." else f"{Path(below).as_posix()}/"
            folders[:] = sorted(one for one in folders if not (is_ours and prefix + one in (PACKED, LEDGER_FOLDER)))
            for name in sorted(names):
                if not name.endswith(".npz") or name.endswith(TEXT_ENCODER) or name.startswith("."):
                    continue
                sized = _SIZED.fullmatch(name)
                yield prefix + (sized["stem"] if sized else name.removesuffix(".npz")), f"{folder}/{name}"

    def keys(self) -> Iterator[str]:
        """The key of every file."""
        return (key for key, _ in self.files())


class SizesByName:
    """Pictures' sizes by name, of the files in one folder that are named by size."""

    def __init__(self, folder: Path) -> None:
        found: list[tuple[int, int, int]] = []
        try:
            with os.scandir(folder) as entries:
                for entry in entries:
                    sized = _SIZED.fullmatch(entry.name)
                    if sized:
                        found.append((hash(sized["stem"]), int(sized["width"]), int(sized["height"])))
        except (FileNotFoundError, NotADirectoryError):
            pass
        columns: Any = np.array(found, np.int64).reshape(-1, 3)
        order = columns[:, 0].argsort(kind="stable")
        self._hashes, self._sizes = columns[order, 0].copy(), columns[order, 1:].astype(np.int32)

    def of(self, name: str) -> Iterator[tuple[int, int]]:
        """Sizes of the files that may be a picture's."""
        first, stop = (int(np.searchsorted(self._hashes, hash(name), side)) for side in ("left", "right"))
        yield from map(tuple, self._sizes[first:stop].tolist())
