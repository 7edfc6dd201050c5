"""Aspect-ratio buckets: the same table and the same choice as sd-scripts.

Source: described in docs/differences.md; tested against 4,500 of its answers (tests/golden/buckets_*.jsonl.gz).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from sdxl_core.config import BucketOptions


@dataclass(frozen=True, slots=True, order=True)
class Bucket:
    """A size that latents are trained at, in pixels. Ordered as sd-scripts orders them: width, then height."""

    width_px: int
    height_px: int

    @property
    def aspect_ratio(self) -> float:
        return self.width_px / self.height_px

    def __str__(self) -> str:
        return f"{self.width_px}x{self.height_px}"


@dataclass(frozen=True, slots=True, kw_only=True)
class BucketChoice:
    """Where a picture goes: scaled to the resized size, then centre-cropped to the bucket.

    `ar_error`: bucket's minus picture's aspect ratio (signed).
    """

    bucket: Bucket
    resized_width_px: int
    resized_height_px: int
    ar_error: float

    @property
    def crop_left_px(self) -> int:
        return max(0, self.resized_width_px - self.bucket.width_px) // 2

    @property
    def crop_top_px(self) -> int:
        return max(0, self.resized_height_px - self.bucket.height_px) // 2

    @property
    def cropped_share(self) -> float:
        """Share of the resized picture's area that the crop throws away."""
        kept = self.bucket.width_px * self.bucket.height_px
        return max(0.0, 1 - kept / (self.resized_width_px * self.resized_height_px))


class TooSmallForBuckets(ValueError):
    """A picture with a side shorter than one step, where enlarging is forbidden."""


@dataclass(frozen=True, slots=True)
class BucketTable:
    """Every bucket, ascending. With `no_upscale` the table is open: a picture's floored size is its bucket."""

    options: BucketOptions
    buckets: tuple[Bucket, ...]

    @classmethod
    def from_options(cls, options: BucketOptions) -> BucketTable:
        """Square of side resolution_px, and for every width in steps the largest height within the area, both ways."""
        step = options.bucket_step_px
        area = options.resolution_px**2
        low, high = options.min_bucket_px, options.max_bucket_px
        side = int(math.sqrt(area) // step) * step
        found = {Bucket(side, side)}
        for width in range(low, high + 1, step):
            height = min(high, int((area // width) // step) * step)
            if height >= low:
                found |= {Bucket(width, height), Bucket(height, width)}
        return cls(options, tuple(sorted(found)))

    def choose(self, *, width_px: int, height_px: int) -> BucketChoice:
        """The bucket with the nearest aspect ratio (the first of equals), and the size that covers it.

        Raises: TooSmallForBuckets: with no_upscale, a side shorter than one step.
        """
        aspect_ratio = width_px / height_px
        if self.options.no_upscale:
            return self._choose_without_upscaling(width_px, height_px, aspect_ratio)
        exact = Bucket(width_px, height_px)
        bucket = exact if exact in self.buckets else min(self.buckets, key=lambda b: abs(b.aspect_ratio - aspect_ratio))
        too_wide = aspect_ratio > bucket.aspect_ratio
        scale = bucket.height_px / height_px if too_wide else bucket.width_px / width_px
        return BucketChoice(
            bucket=bucket,
            resized_width_px=int(width_px * scale + 0.5),
            resized_height_px=int(height_px * scale + 0.5),
            ar_error=bucket.aspect_ratio - aspect_ratio,
        )

    def _choose_without_upscaling(self, width_px: int, height_px: int, aspect_ratio: float) -> BucketChoice:
        step = self.options.bucket_step_px
        width, height = width_px, height_px
        if width * height > self.options.resolution_px**2:
            width, height = self._shrunk(aspect_ratio)
        bucket = Bucket(width - width % step, height - height % step)
        if not bucket.width_px or not bucket.height_px:
            raise TooSmallForBuckets(f"{width_px}x{height_px} px has a side shorter than one bucket step of {step} px")
        return BucketChoice(
            bucket=bucket, resized_width_px=width, resized_height_px=height, ar_error=bucket.aspect_ratio - aspect_ratio
        )

    def _shrunk(self, aspect_ratio: float) -> tuple[int, int]:
        """(width, height) within the area: width or height rounded to steps, whichever keeps the ratio better."""
        area = self.options.resolution_px**2
        exact_width = math.sqrt(area * aspect_ratio)
        exact_height = area / exact_width
        by_width = self._floor(exact_width)
        by_height = self._floor(exact_height)
        error_by_width = _ratio_error(by_width, self._floor(by_width / aspect_ratio), aspect_ratio)
        error_by_height = _ratio_error(self._floor(by_height * aspect_ratio), by_height, aspect_ratio)
        if error_by_width < error_by_height:
            return by_width, int(by_width / aspect_ratio + 0.5)
        return int(by_height * aspect_ratio + 0.5), by_height

    def _floor(self, value: float) -> int:
        rounded = int(value + 0.5)
        return rounded - rounded % self.options.bucket_step_px


def _ratio_error(width: int, height: int, aspect_ratio: float) -> float:
    return abs(width / height - aspect_ratio) if height else math.inf


def crop_ltrb(bucket: Bucket, *, width_px: int, height_px: int) -> tuple[float, float, float, float]:
    """What sd-scripts stores as crop (left, top, right, bottom): the picture *fitted inside* the bucket, in pixels.

    Not the offsets of the crop that is applied; matched because the conditioning is made from it.
    """
    aspect_ratio = width_px / height_px
    if bucket.aspect_ratio > aspect_ratio:
        width, height = bucket.height_px * aspect_ratio, float(bucket.height_px)
    else:
        width, height = float(bucket.width_px), bucket.width_px / aspect_ratio
    left, top = (bucket.width_px - width) // 2, (bucket.height_px - height) // 2
    return left, top, left + width, top + height
