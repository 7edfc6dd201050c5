"""What is kept of a picture: its latents and the sizes that condition on them."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from dataclasses import dataclass
from math import isfinite, prod
from typing import Any

import numpy as np
from numpy.typing import NDArray

SERIAL = 1 << 15  # numbers that torch converts without waking its threads, which a forked process has not
Latents = NDArray[np.floating[Any]]


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class LatentRecord:
    """A picture's latents and sizes.

    latents:         float32 or float16 [4, height / 8, width / 8], not scaled by the VAE's factor: a sample of the
                     posterior, or its mean where `logvar` is given.
    original_width_px, original_height_px: of the source picture.   crop_ltrb: see buckets.crop_ltrb.
    latents_flipped: as `latents`, of the mirrored picture.
    alpha_mask:      uint8 [height, width] in pixels of the bucket; 255 is opaque.
    logvar:          as `latents`: logarithm of the posterior's variance.
    image_sha256:    digest of the picture's file, 32 bytes; empty where it is not known.
    """

    latents: Latents
    original_width_px: int
    original_height_px: int
    crop_ltrb: tuple[float, float, float, float]
    latents_flipped: Latents | None = None
    alpha_mask: NDArray[np.uint8] | None = None
    logvar: Latents | None = None
    image_sha256: bytes = b""

    @property
    def bucket(self) -> tuple[int, int]:
        """Width and height of the bucket in pixels."""
        return 8 * self.latents.shape[2], 8 * self.latents.shape[1]

    def arrays(self) -> Iterator[tuple[str, NDArray[Any]]]:
        """The arrays that are there, by name, in the order in which checksums go over them."""
        yield "latents", self.latents
        if self.latents_flipped is not None:
            yield "latents_flipped", self.latents_flipped
        if self.alpha_mask is not None:
            yield "alpha_mask", self.alpha_mask
        if self.logvar is not None:
            yield "logvar", self.logvar


@dataclass(frozen=True, slots=True, kw_only=True)
class WrittenFile:
    """A file as written, not yet synced.

    crc32: of all its bytes.   row_crc32s: one a picture: of a packed row's arrays; per_image: of the file.
    """

    num_bytes: int
    crc32: int
    row_crc32s: tuple[int, ...]


def is_finite(array: NDArray[Any]) -> bool:
    """Whether no value is NaN or infinite. Half floats are looked at as integers; integers are finite."""
    if array.dtype == np.float16:
        return bool((array.view(np.uint16) & 0x7C00).max(initial=0) != 0x7C00)
    if array.dtype == np.float32:
        return not array.size or isfinite(float(array.max()) - float(array.min()))  # either would be NaN or infinite
    return True


class Scratch(threading.local):
    """Memory that a thread uses again and again: fresh pages cost more than what is computed in them."""

    memory = np.empty(0, np.uint8)

    def arrays(self, shape: tuple[int, ...], dtype: str, count: int) -> list[Latents]:
        """As many arrays; valid until the next call in this thread."""
        num_bytes = count * prod(shape) * np.dtype(dtype).itemsize
        if len(self.memory) < num_bytes:
            self.memory = np.empty(num_bytes, np.uint8)
        return list(self.memory[:num_bytes].view(dtype).reshape(count, *shape))


def cast(array: Latents, dtype: str, *, out: Latents | None = None) -> Latents:
    """Contiguous, in `dtype`, rounded to nearest even; torch converts to and from half precision 15 times as quickly as
    numpy, with the same bits. Args: out: where a converted copy goes."""
    if array.dtype == dtype:
        return np.ascontiguousarray(array)
    values: Latents = np.empty(array.shape, dtype) if out is None else out
    if {array.dtype.name, values.dtype.name} != {"float16", "float32"}:
        values[...] = array
        return values
    import torch

    source, target = torch.from_numpy(np.ascontiguousarray(array).reshape(-1)), torch.from_numpy(values.reshape(-1))
    for start in range(0, values.size, SERIAL):
        target[start : start + SERIAL].copy_(source[start : start + SERIAL])
    return values
