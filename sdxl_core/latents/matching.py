"""Finding names among millions without an object for each: sorted 64-bit hashes, and a comparison of what they find."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from sdxl_core.catalog.parts import key_hashes

Ints = np.ndarray[Any, np.dtype[Any]]
_PIECE = 65_536
_FACTOR = np.uint64(0x9E3779B97F4A7C15)


class NameTable:
    """Names that can be looked up. Holds 12 bytes a name besides the names themselves (large_string, one chunk)."""

    def __init__(self, names: pa.LargeStringArray) -> None:
        self._names = names
        hashes = hashes_of(names)
        self._order = np.argsort(hashes, kind="stable").astype(np.uint32)
        self._hashes = hashes[self._order]

    def find(self, wanted: Sequence[str] | pa.Array) -> Ints:
        """int64: position of the first equal name, -1 where there is none."""
        texts = wanted.cast(pa.large_string()) if isinstance(wanted, pa.Array) else pa.array(wanted, pa.large_string())
        found = np.full(len(texts), -1, np.int64)
        hashes = hashes_of(texts)
        places = np.searchsorted(self._hashes, hashes)
        left = np.arange(len(texts))
        while len(left):  # once, unless two names share a hash
            left = left[places[left] < len(self._hashes)]
            left = left[self._hashes[places[left]] == hashes[left]]
            if not len(left):
                break
            candidates = self._order[places[left]].astype(np.int64)
            same = np.asarray(pc.equal(self._names.take(pa.array(candidates)), texts.take(pa.array(left))))
            found[left[same]] = candidates[same]
            left = left[~same]
            places[left] += 1
        return found


def hashes_of(names: pa.Array) -> Ints:
    """uint64: a hash of each name, in pieces, so that a few ten megabytes are used meanwhile."""
    pieces = [key_hashes(names.slice(start, _PIECE)).to_numpy() for start in range(0, len(names), _PIECE)]
    return np.concatenate([*pieces, np.zeros(0, np.uint64)])


def mixed(hashes: Ints, *numbers: Ints) -> Ints:
    """uint64: the hashes with whole numbers mixed in."""
    result = hashes.copy()
    for number in numbers:
        result = (result ^ number.astype(np.int64).view(np.uint64)) * _FACTOR
        result ^= result >> np.uint64(29)
    return result


def marks_of(keys: pa.Array, crc32: Ints) -> Ints:
    """uint64: a hash of each key with the checksum of its latents."""
    return mixed(hashes_of(keys.cast(pa.large_string())), crc32.astype(np.int64))


class HashTable:
    """Where hashes are. Holds 12 bytes each."""

    def __init__(self, hashes: Ints) -> None:
        self._order = np.argsort(hashes, kind="stable").astype(np.uint32)
        self._hashes = hashes[self._order]

    def find(self, wanted: Ints) -> Ints:
        """int64: position of the first equal hash, -1 where there is none."""
        if not len(self._hashes):
            return np.full(len(wanted), -1, np.int64)
        places = np.minimum(np.searchsorted(self._hashes, wanted), len(self._hashes) - 1)
        return np.where(self._hashes[places] == wanted, self._order[places].astype(np.int64), -1)
