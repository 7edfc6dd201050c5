"""Decoding: any picture file to upright RGB, or one word why not."""

from __future__ import annotations

import io
import struct
import warnings
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, BinaryIO

import cv2
import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageCms, UnidentifiedImageError

from sdxl_core.images.fast import WEBP_HEADER_BYTES, jpeg_rgb, plain_webp_header, png_pixels, webp_pixels

# Pillow's own limit is global and half of what a panorama needs; every picture is measured from its header instead,
# before any pixel is decoded (`probe`).
Image.MAX_IMAGE_PIXELS = None
warnings.filterwarnings("ignore", category=UserWarning, module=r"PIL\.")

ORIENTATION = 0x0112
UPRIGHT: dict[int, tuple[Callable[[Any], Any], ...]] = {
    2: (partial(cv2.flip, flipCode=1),),
    3: (partial(cv2.rotate, rotateCode=cv2.ROTATE_180),),
    4: (partial(cv2.flip, flipCode=0),),
    5: (cv2.transpose,),
    6: (partial(cv2.rotate, rotateCode=cv2.ROTATE_90_CLOCKWISE),),
    7: (cv2.transpose, partial(cv2.rotate, rotateCode=cv2.ROTATE_180)),
    8: (partial(cv2.rotate, rotateCode=cv2.ROTATE_90_COUNTERCLOCKWISE),),
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


@dataclass(frozen=True, slots=True, kw_only=True)
class Header:
    """What a picture's header says.

    width_px, height_px: as stored.   orientation: EXIF's, 1-8.   mode: Pillow's name of the pixel format.
    kind: JPEG, PNG or WEBP where a quick decoder may give Pillow's pixels, "" elsewhere.
    """

    width_px: int
    height_px: int
    orientation: int
    mode: str
    kind: str

    def size(self, *, honour_exif: bool) -> PictureSize:
        turned = honour_exif and self.orientation >= 5
        width_px, height_px = (self.height_px, self.width_px) if turned else (self.width_px, self.height_px)
        return PictureSize(width_px=width_px, height_px=height_px)


def read_header(data: bytes, *, compat: str) -> Header:
    """The header of a picture file's bytes; no pixel is decoded.

    Raises: BadPicture: empty_file, undecodable.
    """
    return read_header_of(io.BytesIO(data), compat=compat)


def read_header_of(file: BinaryIO, *, compat: str) -> Header:
    """The header of a picture's open file, at its beginning; as little is read of it as Pillow needs.

    Raises: BadPicture: as `read_header`.
    """
    plain = plain_webp_header(file.read(WEBP_HEADER_BYTES), compat=compat)
    if plain is not None:
        width_px, height_px, has_alpha = plain
        mode = "RGBA" if has_alpha else "RGB"
        return Header(width_px=width_px, height_px=height_px, orientation=1, mode=mode, kind="WEBP")
    try:
        with Image.open(file, formats=FORMATS) as image:
            return Header(
                width_px=image.width,
                height_px=image.height,
                orientation=1 if compat == "sd-scripts" else orientation(image),
                mode=image.mode,
                kind=_quick_kind(image, compat),
            )
    except DECODER_ERRORS as error:
        raise _undecodable(file.seek(0, io.SEEK_END), error) from error


def _quick_kind(image: Image.Image, compat: str) -> str:
    """JPEG, PNG or WEBP, "" where only Pillow gives the pixels that are asked for."""
    modes = {"JPEG": ("RGB", "L"), "MPO": ("RGB", "L"), "PNG": ("RGB", "RGBA", "L", "LA"), "WEBP": ("RGB", "RGBA")}
    if image.mode not in modes.get(image.format or "", ()):
        return ""
    if "transparency" in image.info or (compat != "sd-scripts" and image.info.get("icc_profile")):
        return ""
    if getattr(image, "is_animated", False) and image.format != "MPO":  # asked of a GIF, it reads to the second frame
        return ""
    return "JPEG" if image.format == "MPO" else image.format or ""


def probe(data: bytes, *, honour_exif: bool) -> PictureSize:
    """A picture's size from the header of its file's bytes; no pixel is decoded.

    Raises: BadPicture: empty_file, undecodable.
    """
    return read_header(data, compat="default" if honour_exif else "sd-scripts").size(honour_exif=honour_exif)


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


@dataclass(frozen=True, slots=True)
class Pixels:
    """rgb: uint8 [height, width, 3].   alpha: uint8 [height, width], 255 is opaque; None where all of it is."""

    rgb: NDArray[np.uint8]
    alpha: NDArray[np.uint8] | None


def decode(data: bytes, *, compat: str, background: str) -> NDArray[np.uint8]:
    """A picture file's bytes as RGB, uint8 [height, width, 3]; of an animation the first frame.

    Args:   compat: "default": EXIF orientation applied, transparency composited over `background` (#rrggbb), embedded
            ICC profile converted to sRGB, 16 bits scaled to 8; "sd-scripts": PIL's convert("RGB") and nothing else.
    Raises: BadPicture: empty_file, undecodable.
    """
    return decode_pixels(data, read_header(data, compat=compat), compat=compat, background=background).rgb


def decode_pixels(data: bytes, header: Header, *, compat: str, background: str, with_alpha: bool = False) -> Pixels:
    """A picture file's bytes as `decode` gives them, and its transparency where that is asked for (`with_alpha`).

    Raises: BadPicture: undecodable.
    """
    keeps_alpha = with_alpha or compat != "sd-scripts"
    pixels = _quick(data, header, alpha=keeps_alpha and header.mode in ("RGBA", "LA"))
    if pixels is None:
        return _by_pillow(data, compat=compat, background=background, with_alpha=with_alpha)
    if pixels.shape[2] == 3:
        return Pixels(_upright(pixels, header.orientation), None)
    alpha: NDArray[np.uint8] = np.asarray(cv2.extractChannel(pixels, 3), dtype=np.uint8)
    is_opaque = alpha.min() == 255
    if compat == "sd-scripts" or is_opaque:
        rgb = np.asarray(cv2.cvtColor(pixels, cv2.COLOR_RGBA2RGB), dtype=np.uint8)
    else:
        rgb = np.asarray(_composite(Image.fromarray(pixels), background))
    turned = None if is_opaque or not with_alpha else _upright(alpha, header.orientation)
    return Pixels(_upright(rgb, header.orientation), turned)


def _quick(data: bytes, header: Header, *, alpha: bool) -> NDArray[np.uint8] | None:
    if header.kind == "JPEG":
        pixels = jpeg_rgb(data)
    elif header.kind == "WEBP":
        pixels = webp_pixels(data, alpha=alpha)
    else:
        pixels = png_pixels(data, alpha=alpha) if header.kind == "PNG" else None
    return None if pixels is None or pixels.shape[:2] != (header.height_px, header.width_px) else pixels


def _by_pillow(data: bytes, *, compat: str, background: str, with_alpha: bool) -> Pixels:
    try:
        with Image.open(io.BytesIO(data), formats=FORMATS) as image:
            if compat == "sd-scripts":
                alpha = image.convert("RGBA").getchannel("A") if with_alpha and image.has_transparency_data else None
                if image.mode == "P":
                    image.info.pop("transparency", None)  # dropped either way; Pillow would warn about each picture
                source = image if alpha is None else image.convert("RGBA")
                return Pixels(np.array(source.convert("RGB")), None if alpha is None else np.array(alpha))
            turn = orientation(image)
            flat = _to_srgb(_to_eight_bits(image))
            alpha = flat.convert("RGBA").getchannel("A") if with_alpha and flat.has_transparency_data else None
            rgb = _upright(np.array(_composite(flat, background)), turn)
            return Pixels(rgb, None if alpha is None else _upright(np.array(alpha), turn))
    except DECODER_ERRORS as error:
        raise _undecodable(len(data), error) from error


def _upright(pixels: NDArray[np.uint8], turn: int) -> NDArray[np.uint8]:
    """uint8 [h, w] or [h, w, 3] turned and mirrored as EXIF orientation `turn` (1-8) asks for."""
    if turn == 1:
        return pixels
    steps = UPRIGHT[turn]
    for step in steps:
        pixels = np.asarray(step(pixels), dtype=np.uint8)
    return pixels


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
