"""Quick decoders, used only where they give Pillow's pixels: OpenCV for JPEG and WebP, ISA-L and libspng for PNG.

Each gives None where it is not certain of that (a damaged file, a rare kind): Pillow then decodes it, or says what is
wrong. So which pictures are rejected, and with which words, never depends on this module.
"""

from __future__ import annotations

import ctypes
import struct
import zlib
from functools import cache
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray

from sdxl_core.vectors import clear_vector_state

PNG_MAGIC, PNG_END = b"\x89PNG\r\n\x1a\n", b"\x00\x00\x00\x00IEND\xae\x42\x60\x82"
PNG_CHANNELS = {0: 1, 2: 3, 4: 2, 6: 4}  # by colour type; palettes are Pillow's
WEBP_HEADER_BYTES = 30
JPEG_START, JPEG_END = b"\xff\xd8\xff", b"\xff\xd9"
STORED_BYTES = 65_535  # a stored block of deflate holds at most
SPNG_IGNORE_ADLER32, SPNG_CRC_USE, SPNG_RGBA8, SPNG_RGB8 = 1, 2, 1, 4

cv2.utils.logging.setLogLevel(cv2.utils.logging.LOG_LEVEL_SILENT)  # it would tell of damage that Pillow tells of


def jpeg_rgb(data: bytes) -> NDArray[np.uint8] | None:
    """A JPEG of one or three channels as uint8 [h, w, 3]; EXIF ignored. None: it does not end where a JPEG ends."""
    if not (data.startswith(JPEG_START) and data.endswith(JPEG_END)):
        return None
    return _by_opencv(data, cv2.IMREAD_COLOR_RGB | cv2.IMREAD_IGNORE_ORIENTATION)


def webp_pixels(data: bytes, *, alpha: bool) -> NDArray[np.uint8] | None:
    """A WebP that is no animation as uint8 [h, w, 3], or with its transparency [h, w, 4]. None: it is damaged."""
    if not alpha:
        return _by_opencv(data, cv2.IMREAD_COLOR_RGB | cv2.IMREAD_IGNORE_ORIENTATION)
    pixels = _by_opencv(data, cv2.IMREAD_UNCHANGED)
    if pixels is None or pixels.ndim != 3 or pixels.shape[2] != 4:
        return None
    return np.asarray(cv2.cvtColor(pixels, cv2.COLOR_BGRA2RGBA, dst=pixels), dtype=np.uint8)


def png_pixels(data: bytes, *, alpha: bool) -> NDArray[np.uint8] | None:
    """A PNG of 8 bits a channel as uint8 [h, w, 3], or with its transparency [h, w, 4].

    Its compressed data is inflated by ISA-L, twice as quick as zlib, and handed to libspng uncompressed.
    None: palette, 16 bits, interlaced, animated, damaged, or no libspng here.
    """
    spng = _spng()
    found = png_header_and_data(data)
    if spng is None or found is None:
        return None
    (width, height, depth, colour, _, _, interlace), compressed = found
    if depth != 8 or colour not in PNG_CHANNELS or interlace:
        return None
    num_bytes = (width * PNG_CHANNELS[colour] + 1) * height
    raw = _inflate(compressed, num_bytes)
    if raw is None:
        return None
    pixels = np.empty((height, width, 4 if alpha else 3), np.uint8)
    stored = _stored_png(data[8:33], raw)
    context = spng.spng_ctx_new(SPNG_IGNORE_ADLER32)
    try:
        spng.spng_set_crc_action(context, SPNG_CRC_USE, SPNG_CRC_USE)
        spng.spng_set_png_buffer(context, stored, len(stored))
        kind = SPNG_RGBA8 if alpha else SPNG_RGB8
        failed = spng.spng_decode_image(context, pixels.ctypes.data, pixels.nbytes, kind, 0)
    finally:
        spng.spng_ctx_free(context)
    return None if failed else pixels


def png_header_and_data(data: bytes) -> tuple[tuple[int, ...], bytes] | None:
    """(width, height, bits, colour type, compression, filter, interlace) and the compressed pixels of a whole PNG.

    None: cut short, a checksum that does not fit (that of the pixels is inside them), or an animation.
    """
    if not data.startswith(PNG_MAGIC):
        return None
    header: tuple[int, ...] | None = None
    pieces: list[memoryview] = []
    view, position = memoryview(data), len(PNG_MAGIC)
    while position + 12 <= len(data):
        length, kind = struct.unpack_from(">I4s", data, position)
        stop = position + 12 + length
        if stop > len(data) or kind == b"acTL":
            return None
        if kind == b"IDAT":
            pieces.append(view[position + 8 : stop - 4])
        elif zlib.crc32(view[position + 4 : stop - 4]) != int.from_bytes(view[stop - 4 : stop], "big"):
            return None
        if kind == b"IHDR" and length == 13:
            header = struct.unpack_from(">IIBBBBB", data, position + 8)
        if kind == b"IEND":
            return None if header is None else (header, b"".join(pieces))
        position = stop
    return None


def plain_webp_header(data: bytes, *, compat: str) -> tuple[int, int, bool] | None:
    """Width, height and whether there is transparency, of a WebP that is one picture and has nothing to look after.

    Its first WEBP_HEADER_BYTES are enough.

    Pillow prepares for an animation when it opens a WebP, which costs two canvases. None: no such WebP; with
    compat = "default" also one with EXIF, XMP or a colour profile.
    Source: RFC 9649, sections 2.5 to 2.7; RFC 6386, section 9.1.
    """
    if len(data) < WEBP_HEADER_BYTES or data[:4] != b"RIFF" or data[8:12] != b"WEBP":
        return None
    kind = data[12:16]
    if kind == b"VP8 " and data[23:26] == b"\x9d\x01\x2a":
        width, height = struct.unpack_from("<HH", data, 26)
        return width & 0x3FFF, height & 0x3FFF, False
    if kind == b"VP8L" and data[20] == 0x2F:
        bits = int.from_bytes(data[21:25], "little")
        return (bits & 0x3FFF) + 1, (bits >> 14 & 0x3FFF) + 1, bool(bits >> 28 & 1)
    if kind == b"VP8X":
        animated, metadata, has_alpha = data[20] & 0x02, data[20] & 0x2C, data[20] & 0x10
        if animated or (metadata and compat != "sd-scripts"):
            return None
        return int.from_bytes(data[24:27], "little") + 1, int.from_bytes(data[27:30], "little") + 1, bool(has_alpha)
    return None


def _by_opencv(data: bytes, flags: int) -> NDArray[np.uint8] | None:
    try:
        pixels = cv2.imdecode(np.frombuffer(data, np.uint8), flags)
    except cv2.error:  # larger than it reads, or out of memory
        return None
    return None if pixels is None or pixels.dtype != np.uint8 else np.asarray(pixels, dtype=np.uint8)


def _inflate(compressed: bytes, num_bytes: int) -> bytes | None:
    """Exactly `num_bytes`, checked by their Adler-32; None where the data says otherwise."""
    from isal import isal_zlib

    inflater = isal_zlib.decompressobj()
    try:
        raw: bytes = inflater.decompress(compressed, num_bytes + 1)
    except isal_zlib.error:  # type: ignore[misc]
        return None
    finally:
        clear_vector_state()
    return raw if len(raw) == num_bytes and inflater.eof else None


def _stored_png(header_chunk: bytes, raw: bytes) -> bytes:
    """A PNG of these filtered rows without compression; its checksums are left out."""
    view = memoryview(raw)
    whole, rest = divmod(len(raw), STORED_BYTES)
    length = 2 + 5 * (whole + 1) + len(raw) + 4
    pieces: list[bytes | memoryview] = [PNG_MAGIC, header_chunk, struct.pack(">I", length), b"IDAT\x78\x01"]
    for start in range(0, whole * STORED_BYTES, STORED_BYTES):
        pieces += (b"\x00\xff\xff\x00\x00", view[start : start + STORED_BYTES])
    pieces += (struct.pack("<BHH", 1, rest, rest ^ 0xFFFF), view[len(raw) - rest :], bytes(8), PNG_END)
    return b"".join(pieces)


@cache
def _spng() -> Any:
    """libspng's C interface, out of the library that pyspng ships; None where there is none.

    pyspng's own function holds the interpreter's lock while it decodes, so threads would take turns.
    Source: libspng's documentation, "Decode" and "Context".
    """
    try:
        from pyspng import _pyspng_c

        library = ctypes.CDLL(_pyspng_c.__file__)
        library.spng_ctx_new.restype = ctypes.c_void_p
        library.spng_ctx_new.argtypes = [ctypes.c_int]
        library.spng_ctx_free.argtypes = [ctypes.c_void_p]
        library.spng_set_crc_action.argtypes = [ctypes.c_void_p, ctypes.c_int, ctypes.c_int]
        library.spng_set_png_buffer.argtypes = [ctypes.c_void_p, ctypes.c_char_p, ctypes.c_size_t]
        library.spng_decode_image.argtypes = [
            ctypes.c_void_p, ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_int,
        ]  # fmt: skip
    except (ImportError, OSError, AttributeError):
        return None
    return library
