"""Decoding: any picture file to upright RGB, or one word why not."""

from __future__ import annotations

import io
import struct
import warnings
import zlib
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageCms, UnidentifiedImageError

# Pillow's own limit is global and half of what a panorama needs; every picture is measured from its header instead,
# before any pixel is decoded (`probe`).
Image.MAX_IMAGE_PIXELS = None
warnings.filterwarnings("ignore", category=UserWarning, module=r"PIL\.")

ORIENTATION = 0x0112
TRANSPOSE = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
# What a picture's file may hold, whatever its name says: no format that runs a program (EPS) or that is no picture.
FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "AVIF", "GIF")  # JPEG includes MPO
Image.init()
# What Pillow's decoders raise on damaged files.
DECODER_ERRORS = (OSError, ValueError, TypeError, SyntaxError, IndexError, KeyError, AttributeError, EOFError,
                  RuntimeError, OverflowError, MemoryError, struct.error, zlib.error)  # fmt: skip


class BadPicture(Exception):
    """A picture that cannot be used. `reason`: one word for the rejected table; `str(error)`: for people."""

    def __init__(self, reason: str, detail: str) -> None:
        super().__init__(detail)
        self.reason = reason


@dataclass(frozen=True, slots=True, kw_only=True)
class PictureSize:
    """Width and height in pixels, after EXIF orientation where that is honoured."""

    width_px: int
    height_px: int


def probe(data: bytes, *, honour_exif: bool) -> PictureSize:
    """A picture's size from the header of its file's bytes; no pixel is decoded.

    Raises: BadPicture: empty_file, undecodable.
    """
    try:
        with Image.open(io.BytesIO(data), formats=FORMATS) as image:
            width_px, height_px = image.size
            turned = honour_exif and orientation(image) >= 5
    except DECODER_ERRORS as error:
        raise _undecodable(len(data), error) from error
    return PictureSize(width_px=height_px if turned else width_px, height_px=width_px if turned else height_px)


def orientation(image: Image.Image) -> int:
    """EXIF orientation 1-8, from the header. A PNG's EXIF counts only where it stands before the pixels: reading
    further would decode the whole picture."""
    if image.format == "PNG" and "exif" not in image.info:
        return 1
    try:
        value = image.getexif().get(ORIENTATION, 1)
    except DECODER_ERRORS:  # its EXIF block is garbage; its pixels need not be
        return 1
    return value if isinstance(value, int) and 1 <= value <= 8 else 1


def decode(data: bytes, *, compat: str, background: str) -> NDArray[np.uint8]:
    """A picture file's bytes as RGB, uint8 [height, width, 3]; of an animation the first frame.

    Args:   compat: "default": EXIF orientation applied, transparency composited over `background` (#rrggbb), embedded
            ICC profile converted to sRGB, 16 bits scaled to 8; "sd-scripts": PIL's convert("RGB") and nothing else.
    Raises: BadPicture: empty_file, undecodable.
    """
    try:
        with Image.open(io.BytesIO(data), formats=FORMATS) as image:
            if compat == "sd-scripts":
                if image.mode == "P":
                    image.info.pop("transparency", None)  # dropped either way; Pillow would warn about each picture
                return np.array(image.convert("RGB"))
            transpose = TRANSPOSE.get(orientation(image))
            flat = _composite(_to_srgb(_to_eight_bits(image)), background)
            return np.array(flat.transpose(transpose) if transpose is not None else flat)
    except DECODER_ERRORS as error:
        raise _undecodable(len(data), error) from error


def _undecodable(num_bytes: int, error: BaseException) -> BadPicture:
    if not num_bytes:
        return BadPicture("empty_file", "the file has no content")
    if isinstance(error, UnidentifiedImageError):
        return BadPicture("undecodable", f"not a picture, or its beginning is damaged ({num_bytes} bytes)")
    return BadPicture("undecodable", f"damaged or cut short: {str(error) or type(error).__name__}")


def _to_eight_bits(image: Image.Image) -> Image.Image:
    """16-bit grey scaled to 8 bits (Pillow's own conversion saturates it to white)."""
    if image.mode.startswith("I;16") or image.mode == "I":
        return Image.fromarray((np.asarray(image).astype(np.int64).clip(0, 65535) // 257).astype(np.uint8))
    return image


def _to_srgb(image: Image.Image) -> Image.Image:
    """Colours converted from an embedded profile; a profile that does not fit the picture is ignored."""
    profile = image.info.get("icc_profile")
    if not profile or image.mode not in ("RGB", "RGBA", "CMYK", "L"):
        return image
    try:
        source = ImageCms.ImageCmsProfile(io.BytesIO(profile))
        target = ImageCms.createProfile("sRGB")
        mode = "RGBA" if image.mode == "RGBA" else "RGB"
        converted = ImageCms.profileToProfile(image, source, target, outputMode=mode)
    except (ImageCms.PyCMSError, OSError, ValueError, TypeError):
        return image
    if converted is None:
        return image
    converted.info = {key: value for key, value in image.info.items() if key == "transparency"}
    return converted


def _composite(image: Image.Image, background: str) -> Image.Image:
    """Opaque RGB: transparent pixels show the background colour."""
    if not image.has_transparency_data:
        return image.convert("RGB")
    rgba = image.convert("RGBA")
    flat = Image.new("RGB", rgba.size, background)
    flat.paste(rgba, mask=rgba.getchannel("A"))
    return flat
