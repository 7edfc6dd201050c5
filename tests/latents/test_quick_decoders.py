"""Quick decoders give Pillow's pixels, bit for bit, or nothing; masks are sd-scripts' transparency."""

import io
import struct
import time
import zlib
from typing import Any

import cv2
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageCms
from support.pictures import encoded, picture

from sdxl_core.buckets import BucketTable
from sdxl_core.config import BucketOptions
from sdxl_core.images import decode as decoding
from sdxl_core.images.decode import Pixels, decode_pixels, read_header
from sdxl_core.images.fast import jpeg_rgb, plain_webp_header, png_pixels
from sdxl_core.images.prepare import fit_with_alpha
from sdxl_core.latents.formats import crc32

WHITE = "#ffffff"
JPEG = [{"quality": q, "subsampling": s, "progressive": p} for q in (30, 95) for s in (0, 1, 2) for p in (False, True)]
WEBP = [{"lossless": True}, {"quality": 20}, {"quality": 90, "exact": True}, {"lossless": True, "exact": True}]
COMPATS = ["default", "sd-scripts"]


def quick(data: bytes, compat: str, *, with_alpha: bool = False) -> Pixels:
    header = read_header(data, compat=compat)
    return decode_pixels(data, header, compat=compat, background="#4080c0", with_alpha=with_alpha)


def by_pillow(data: bytes, compat: str, *, with_alpha: bool = False) -> Pixels:
    return decoding._by_pillow(data, compat=compat, background="#4080c0", with_alpha=with_alpha)


def assert_same(data: bytes, *, is_quick: bool = True) -> None:
    for compat in COMPATS:
        for with_alpha in (False, True):
            ours, theirs = (see(data, compat, with_alpha=with_alpha) for see in (quick, by_pillow))
            assert np.array_equal(ours.rgb, theirs.rgb), (compat, with_alpha)
            alphas = [np.full(p.rgb.shape[:2], 255) if p.alpha is None else p.alpha for p in (ours, theirs)]
            assert np.array_equal(*alphas), (compat, with_alpha)
        assert bool(read_header(data, compat=compat).kind) == is_quick, compat


@settings(max_examples=60, deadline=None)
@given(
    width_px=st.integers(1, 200), height_px=st.integers(1, 200), seed=st.integers(0, 99),
    mode=st.sampled_from(["RGB", "L"]), options=st.sampled_from([*JPEG, {"keep_rgb": True}, {"optimize": True}]),
    blocks=st.integers(0, 3),
)  # fmt: skip
def test_jpegs(width_px: int, height_px: int, seed: int, mode: str, options: dict[str, Any], blocks: int) -> None:
    data = encoded(picture(width_px, height_px, seed=seed, mode=mode), "JPEG", restart_marker_blocks=blocks, **options)
    assert jpeg_rgb(data) is not None
    assert_same(data)


@settings(max_examples=60, deadline=None)
@given(
    width_px=st.integers(1, 200), height_px=st.integers(1, 200), seed=st.integers(0, 99),
    mode=st.sampled_from(["RGB", "RGBA"]), options=st.sampled_from(WEBP),
)  # fmt: skip
def test_webps(width_px: int, height_px: int, seed: int, mode: str, options: dict[str, Any]) -> None:
    data = encoded(picture(width_px, height_px, seed=seed, mode=mode), "WEBP", **options)
    header = plain_webp_header(data, compat="default")
    with Image.open(io.BytesIO(data)) as image:
        assert header == (*image.size, image.mode == "RGBA") == (width_px, height_px, mode == "RGBA")
    assert_same(data)


@settings(max_examples=60, deadline=None)
@given(
    width_px=st.integers(1, 200), height_px=st.integers(1, 200), seed=st.integers(0, 99),
    mode=st.sampled_from(["RGB", "RGBA", "L", "LA"]), level=st.integers(0, 9),
)  # fmt: skip
def test_pngs(width_px: int, height_px: int, seed: int, mode: str, level: int) -> None:
    data = encoded(picture(width_px, height_px, seed=seed, mode=mode), "PNG", compress_level=level)
    assert png_pixels(data, alpha=False) is not None
    assert_same(data)


@pytest.mark.parametrize("mode", ["P", "1", "I;16"])
def test_kinds_that_only_pillow_reads(mode: str) -> None:
    image = picture(40, 30)
    grey = Image.fromarray(np.arange(1200, dtype=np.uint16).reshape(30, 40) * 50)
    data = encoded(grey if mode == "I;16" else image.quantize(32) if mode == "P" else image.convert("1"), "PNG")
    assert_same(data, is_quick=False)


def test_a_picture_with_a_profile_or_a_transparent_colour_is_pillows_by_default() -> None:
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    for kind, options in [("PNG", {"icc_profile": profile}), ("JPEG", {"icc_profile": profile}),
                          ("WEBP", {"icc_profile": profile})]:  # fmt: skip
        data = encoded(picture(40, 30), kind, **options)
        assert read_header(data, compat="default").kind == ""
        assert read_header(data, compat="sd-scripts").kind == kind
        for compat in COMPATS:
            assert np.array_equal(quick(data, compat).rgb, by_pillow(data, compat).rgb)
    plain = picture(40, 30)
    assert_same(encoded(plain, "PNG", transparency=plain.getpixel((3, 4))), is_quick=False)


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP"])
@pytest.mark.parametrize("turn", range(1, 9))
def test_turned_pictures(kind: str, turn: int) -> None:
    exif = Image.Exif()
    exif[0x0112] = turn
    assert_same(encoded(picture(40, 24, mode="RGB" if kind == "JPEG" else "RGBA"), kind, exif=exif))


@settings(max_examples=150, deadline=None)
@given(kind=st.sampled_from(["PNG", "JPEG", "WEBP"]), mode=st.sampled_from(["RGB", "RGBA"]), data=st.data())
def test_damage_is_judged_as_pillow_judges_it(kind: str, mode: str, data: st.DataObject) -> None:
    """What Pillow refuses is refused; what both read has Pillow's pixels (a JPEG has no checksum)."""
    whole = bytearray(encoded(picture(48, 32, mode="RGB" if kind == "JPEG" else mode), kind))
    whole[data.draw(st.integers(0, len(whole) - 1))] ^= data.draw(st.integers(1, 255))
    damaged = bytes(whole[: data.draw(st.sampled_from([len(whole), len(whole) // 2, len(whole) - 3]))])
    for compat in COMPATS:
        outcomes = []
        for see in (quick, by_pillow):
            try:
                outcomes.append(see(damaged, compat).rgb)
            except decoding.BadPicture:
                outcomes.append(None)
        ours, theirs = outcomes
        if ours is None or theirs is None:
            assert ours is theirs, (compat, ours is None)
        else:
            assert np.array_equal(ours, theirs)


def test_an_interlaced_png_is_read() -> None:
    """Adam7 of a picture of one pixel: one pass, one row."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", 1, 1, 8, 2, 0, 0, 1))
    data = b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", zlib.compress(b"\0\x0a\x14\x1e")) + chunk(b"IEND", b"")
    assert png_pixels(data, alpha=False) is None
    assert quick(data, "default").rgb.tolist() == [[[10, 20, 30]]]


@settings(max_examples=60, deadline=None)
@given(
    width_px=st.integers(20, 300), height_px=st.integers(20, 300), seed=st.integers(0, 99),
    mode=st.sampled_from(["RGB", "RGBA", "L", "LA", "P"]),
)  # fmt: skip
def test_masks_and_colours_are_sd_scripts(width_px: int, height_px: int, seed: int, mode: str) -> None:
    """Its alpha_mask: everything as RGBA, four channels scaled together, the mask is A / 255 of the bucket's pixels."""
    image = picture(width_px, height_px, seed=seed, mode="RGBA" if mode == "P" else mode)
    data = encoded(image.quantize(16) if mode == "P" else image, "PNG")
    options = BucketOptions(resolution_px=128, min_bucket_px=64, max_bucket_px=256, bucket_step_px=32)
    choice = BucketTable.from_options(options).choose(width_px=width_px, height_px=height_px)
    rgb, alpha = fit_with_alpha(quick(data, "sd-scripts", with_alpha=True), choice, compat="sd-scripts")

    rgba = np.array(Image.open(io.BytesIO(data)).convert("RGBA"))
    size = choice.resized_width_px, choice.resized_height_px
    if (width_px, height_px) != size:
        if width_px >= size[0] and height_px >= size[1]:
            rgba = cv2.resize(rgba, size, interpolation=cv2.INTER_AREA)
        else:
            rgba = np.array(Image.fromarray(rgba).resize(size, Image.Resampling.LANCZOS))
    top, left = choice.crop_top_px, choice.crop_left_px
    rgba = rgba[top : top + choice.bucket.height_px, left : left + choice.bucket.width_px]
    assert np.array_equal(rgb, rgba[..., :3])
    assert np.array_equal(alpha.astype(np.float32) / 255, rgba[..., 3].astype(np.float32) / 255)

    own, own_alpha = fit_with_alpha(quick(data, "default", with_alpha=True), choice, compat="default")
    assert np.array_equal(own_alpha, alpha) and own.shape == rgb.shape


def test_isal_does_not_slow_down_what_follows_it_on_its_thread() -> None:
    """It leaves the vector registers in a state in which OpenCV takes four times as long."""
    pixels = np.random.default_rng(0).integers(0, 256, (600, 700, 3), dtype=np.uint8)

    def fastest() -> float:
        times = []
        for _ in range(7):
            started = time.thread_time()
            cv2.resize(pixels, (355, 303), interpolation=cv2.INTER_AREA)
            times.append(time.thread_time() - started)
        return min(times)

    data = encoded(picture(200, 200), "PNG")
    clean = fastest()
    assert png_pixels(data, alpha=False) is not None
    assert fastest() < 2.5 * clean
    crc32(data)
    assert fastest() < 2.5 * clean
