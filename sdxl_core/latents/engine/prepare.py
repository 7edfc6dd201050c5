"""A picture's bytes to what the VAE takes: header, bucket, pixels, mask and noise, in one go on one thread."""

from __future__ import annotations

import hashlib
import threading
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from sdxl_core.buckets import BucketChoice, BucketTable
from sdxl_core.config import LatentsOptions
from sdxl_core.images.decode import BadPicture, PictureSize, decode_pixels, read_header
from sdxl_core.images.prepare import choose_bucket, fit_to_bucket, fit_with_alpha
from sdxl_core.latents.engine.records import Picture
from sdxl_core.latents.vae import FLIPPED, posterior_noise

LARGE_MEGAPIXELS = 32  # from here on one at a time, so that a folder of panoramas does not fill the memory
_one_at_a_time = threading.Lock()


@dataclass(frozen=True, slots=True, kw_only=True)
class Prepared:
    """A picture that can be encoded.

    pixels: uint8 [h, w, 3] of its bucket.   alpha: uint8 [h, w], where masks are kept.   digest: SHA-256 of its file.
    noise:  float32 [4, h / 8, w / 8] each: for its latents, and for those of the mirrored picture; none where the
            posterior is kept.
    """

    picture: Picture
    size: PictureSize
    choice: BucketChoice
    pixels: NDArray[np.uint8]
    alpha: NDArray[np.uint8] | None
    digest: bytes
    noise: tuple[Tensor, ...]


def prepare(picture: Picture, data: bytes, table: BucketTable, options: LatentsOptions) -> Prepared:
    """Look at the header, and if the picture is worth it decode and fit it.

    Raises: BadPicture: empty_file, undecodable, too_small, too_large, extreme_aspect.
    """
    header = read_header(data, compat=options.compat)
    size = header.size(honour_exif=options.compat != "sd-scripts")
    choice = choose_bucket(size, table, options)
    with _memory_for(size):
        image = decode_pixels(
            data, header, compat=options.compat, background=options.background, with_alpha=options.alpha_mask
        )
        if image.rgb.shape[:2] != (size.height_px, size.width_px):
            raise BadPicture("undecodable", "its pixels are of another size than its header says")
        if options.alpha_mask:
            pixels, alpha = fit_with_alpha(image, choice, compat=options.compat)
        else:
            pixels, alpha = fit_to_bucket(image.rgb, choice), None
    digest = hashlib.sha256(data).digest()
    height, width = pixels.shape[0] // 8, pixels.shape[1] // 8
    sides = () if options.logvar else (b"", FLIPPED) if options.flip_aug else (b"",)
    return Prepared(
        picture=picture,
        size=size,
        choice=choice,
        pixels=pixels,
        alpha=alpha,
        digest=digest,
        noise=tuple(posterior_noise(digest + side, options.seed, height, width) for side in sides),
    )


def _memory_for(size: PictureSize) -> AbstractContextManager[object]:
    return _one_at_a_time if size.width_px * size.height_px > LARGE_MEGAPIXELS * 1_000_000 else nullcontext()
