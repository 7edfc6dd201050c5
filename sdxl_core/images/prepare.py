"""Resizing and cropping to a bucket, pixel for pixel as sd-scripts does it."""

from __future__ import annotations

import cv2
import numpy as np
from numpy.typing import NDArray
from PIL import Image

from sdxl_core.buckets import BucketChoice, BucketTable, TooSmallForBuckets
from sdxl_core.config import LatentsOptions
from sdxl_core.images.decode import BadPicture, PictureSize, Pixels

cv2.setNumThreads(1)  # pictures are prepared in parallel; a pool inside each of them only costs


def resize(image: NDArray[np.uint8], *, width_px: int, height_px: int) -> NDArray[np.uint8]:
    """uint8 [h, w, …] to [height_px, width_px, …]: OpenCV's INTER_AREA where neither side grows, else Lanczos."""
    height, width = image.shape[:2]
    if (width, height) == (width_px, height_px):
        return image
    if width >= width_px and height >= height_px:
        return np.asarray(cv2.resize(image, (width_px, height_px), interpolation=cv2.INTER_AREA), dtype=np.uint8)
    enlarged = Image.fromarray(image).resize((width_px, height_px), Image.Resampling.LANCZOS)
    return np.asarray(enlarged)


def fit_to_bucket(image: NDArray[np.uint8], choice: BucketChoice) -> NDArray[np.uint8]:
    """Scale to cover the bucket and cut its centre out: uint8 [bucket height, bucket width, 3], contiguous.

    Raises: BadPicture: undecodable, where the libraries refuse (out of memory).
    """
    try:
        resized = resize(image, width_px=choice.resized_width_px, height_px=choice.resized_height_px)
    except (cv2.error, MemoryError) as error:
        raise BadPicture("undecodable", f"cannot be resized: {error}") from error
    top, left = choice.crop_top_px, choice.crop_left_px
    cropped = resized[top : top + choice.bucket.height_px, left : left + choice.bucket.width_px]
    return np.ascontiguousarray(cropped)


def fit_with_alpha(image: Pixels, choice: BucketChoice, *, compat: str) -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
    """Pixels and transparency in a bucket: uint8 [h, w, 3] and [h, w], 255 is opaque.

    compat = "sd-scripts" scales all four channels as one picture, as it does: where one is enlarged, Pillow weighs the
    colours by their opacity.   Raises: as `fit_to_bucket`.
    """
    if image.alpha is None:
        rgb = fit_to_bucket(image.rgb, choice)
        return rgb, np.full(rgb.shape[:2], 255, np.uint8)
    if compat == "sd-scripts":
        both = fit_to_bucket(np.dstack((image.rgb, image.alpha)), choice)
        return np.ascontiguousarray(both[..., :3]), np.ascontiguousarray(both[..., 3])
    return fit_to_bucket(image.rgb, choice), fit_to_bucket(image.alpha, choice)


def choose_bucket(size: PictureSize, table: BucketTable, options: LatentsOptions) -> BucketChoice:
    """The bucket of a picture that is worth encoding.

    Raises: BadPicture: too_small, too_large, extreme_aspect.
    """
    width_px, height_px = size.width_px, size.height_px
    if min(width_px, height_px) < options.min_side_px:
        raise BadPicture("too_small", f"{width_px}x{height_px} px: a side is shorter than {options.min_side_px} px")
    if width_px * height_px > options.max_image_megapixels * 1_000_000:
        megapixels = width_px * height_px / 1e6
        detail = f"{width_px}x{height_px} px: {megapixels:.0f} megapixels, allowed are {options.max_image_megapixels}"
        raise BadPicture("too_large", detail)
    try:
        choice = table.choose(width_px=width_px, height_px=height_px)
    except TooSmallForBuckets as error:
        raise BadPicture("too_small", str(error)) from error
    if choice.cropped_share > options.max_cropped_share:
        raise BadPicture(
            "extreme_aspect", f"{width_px}x{height_px} px: the crop would throw {choice.cropped_share:.0%} of it away"
        )
    return choice
