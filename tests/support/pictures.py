"""Real picture files, good and bad, made here."""

import io
import struct
import zlib
from typing import Any

import numpy as np
from PIL import Image


def picture(width_px: int, height_px: int, *, seed: int = 0, mode: str = "RGB") -> Image.Image:
    """Smooth colours with some noise, so that resizing and compression have something to do."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[0:height_px, 0:width_px]
    waves = [np.sin(x / 7 + shift) * np.cos(y / 11 - shift) * 90 + 128 for shift in rng.uniform(0, 6, 4)]
    pixels = (np.stack(waves, axis=-1) + rng.normal(0, 8, (height_px, width_px, 4))).clip(0, 255).astype(np.uint8)
    return Image.fromarray(pixels, "RGBA").convert(mode) if mode != "RGBA" else Image.fromarray(pixels, "RGBA")


def encoded(image: Image.Image, kind: str, **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def bomb(width_px: int, height_px: int) -> bytes:
    """A PNG whose header promises far more pixels than there are."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width_px, height_px, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"\0")) + chunk(b"IEND", b"")
