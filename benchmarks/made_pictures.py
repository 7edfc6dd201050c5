"""Pictures for benchmarks: shapes, gradients and grain, so that codecs have something to do."""

from __future__ import annotations

import io

import cv2
import numpy as np
from numpy.typing import NDArray
from PIL import Image

KINDS: dict[str, tuple[str, str, dict[str, object]]] = {  # kind: format, mode, options
    "webp": ("WEBP", "RGB", {"quality": 90}),
    "webp lossless": ("WEBP", "RGB", {"lossless": True, "method": 0}),
    "webp alpha": ("WEBP", "RGBA", {"quality": 90}),
    "png": ("PNG", "RGB", {}),
    "png alpha": ("PNG", "RGBA", {}),
    "jpg": ("JPEG", "RGB", {"quality": 92}),
}


def made_picture(width_px: int, height_px: int, seed: int) -> NDArray[np.uint8]:
    """uint8 [height, width, 3]."""
    rng = np.random.default_rng(seed)

    def smooth(every_px: int) -> NDArray[np.uint8]:
        coarse = rng.integers(0, 256, (height_px // every_px + 1, width_px // every_px + 1, 3), dtype=np.uint8)
        return cv2.resize(coarse, (width_px, height_px), interpolation=cv2.INTER_CUBIC)

    grain = rng.normal(0, 3, (height_px, width_px, 1))
    pixels = (0.75 * smooth(64) + 0.2 * smooth(8) + grain).clip(0, 255).astype(np.uint8)
    for number in range(40):
        centre = int(rng.integers(width_px)), int(rng.integers(height_px))
        colour = tuple(int(value) for value in rng.integers(0, 256, 3))
        radius = int(rng.integers(width_px // 80 + 1, width_px // 6 + 2))
        cv2.circle(pixels, centre, radius, colour, -1 if number % 2 else 3, cv2.LINE_AA)
    return pixels


def made_file(kind: str, width_px: int, height_px: int, seed: int) -> bytes:
    """A picture's file. `kind`: of KINDS."""
    format_name, mode, options = KINDS[kind]
    image = Image.fromarray(made_picture(width_px, height_px, seed))
    if mode == "RGBA":
        mask = Image.new("L", image.size, 255)
        mask.paste(0, (0, 0, width_px // 3, height_px // 4))
        image.putalpha(mask)
    buffer = io.BytesIO()
    image.save(buffer, format_name, **options)
    return buffer.getvalue()
