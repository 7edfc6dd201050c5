"""Pixels: exactly sd-scripts' where asked, what a person sees by default; every bad file is one word."""

import io
import struct

import cv2
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageCms
from support.pictures import bomb, encoded, picture

from sdxl_core.buckets import BucketTable
from sdxl_core.config import BucketOptions, LatentsOptions
from sdxl_core.images.decode import BadPicture, PictureSize, decode, probe
from sdxl_core.images.prepare import choose_bucket, fit_to_bucket

WHITE = "#ffffff"


def see(data: bytes, **options: str) -> np.ndarray:
    return decode(data, **{"compat": "default", "background": WHITE} | options)


def as_sd_scripts(data: bytes, reso: tuple[int, int], resized: tuple[int, int]) -> np.ndarray:
    """The reference: convert("RGB"), OpenCV's area or Pillow's Lanczos, centre crop (its documented behaviour)."""
    image = np.array(Image.open(io.BytesIO(data)).convert("RGB"))
    height, width = image.shape[:2]
    if (width, height) != resized:
        if width >= resized[0] and height >= resized[1]:
            image = cv2.resize(image, resized, interpolation=cv2.INTER_AREA)
        else:
            image = np.array(Image.fromarray(image).resize(resized, Image.Resampling.LANCZOS))
    height, width = image.shape[:2]
    if width > reso[0]:
        left = (width - reso[0]) // 2
        image = image[:, left : left + reso[0]]
    if height > reso[1]:
        top = (height - reso[1]) // 2
        image = image[top : top + reso[1]]
    return image


@settings(max_examples=40, deadline=None)
@given(
    width_px=st.integers(20, 300),
    height_px=st.integers(20, 300),
    mode=st.sampled_from(["RGB", "RGBA", "L", "LA", "P", "1"]),
    seed=st.integers(0, 99),
)
def test_compat_pixels_equal_the_reference(width_px: int, height_px: int, mode: str, seed: int) -> None:
    data = encoded(picture(width_px, height_px, seed=seed, mode=mode), "PNG")
    options = BucketOptions(resolution_px=128, min_bucket_px=64, max_bucket_px=256, bucket_step_px=32)
    choice = BucketTable.from_options(options).choose(width_px=width_px, height_px=height_px)
    ours = fit_to_bucket(see(data, compat="sd-scripts"), choice)
    reso = (choice.bucket.width_px, choice.bucket.height_px)
    expected = as_sd_scripts(data, reso, (choice.resized_width_px, choice.resized_height_px))
    assert ours.shape == (reso[1], reso[0], 3) and np.array_equal(ours, expected)


@pytest.mark.parametrize("value", range(1, 9))
def test_a_rotated_photograph_is_upright_and_has_the_upright_size(value: int) -> None:
    upright = np.array(picture(40, 24))
    undo = {1: None, 2: Image.Transpose.FLIP_LEFT_RIGHT, 3: Image.Transpose.ROTATE_180,
            4: Image.Transpose.FLIP_TOP_BOTTOM, 5: Image.Transpose.TRANSPOSE, 6: Image.Transpose.ROTATE_90,
            7: Image.Transpose.TRANSVERSE, 8: Image.Transpose.ROTATE_270}[value]  # fmt: skip
    stored = Image.fromarray(upright) if undo is None else Image.fromarray(upright).transpose(undo)
    exif = Image.Exif()
    exif[0x0112] = value
    for kind in ("PNG", "WEBP"):
        data = encoded(stored, kind, exif=exif, **({"lossless": True} if kind == "WEBP" else {}))
        assert np.array_equal(see(data), upright), kind
        assert probe(data, honour_exif=True) == PictureSize(width_px=40, height_px=24)
        assert np.array_equal(see(data, compat="sd-scripts"), np.array(stored))


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P"])
def test_transparency_shows_the_background(mode: str) -> None:
    image = Image.new("RGBA", (4, 4), (200, 0, 0, 0))
    image.putpixel((0, 0), (10, 20, 30, 255))
    data = encoded(image.convert("LA") if mode == "LA" else image if mode == "RGBA" else image.quantize(4), "PNG")
    pixels = see(data, background="#00ff80")
    assert tuple(pixels[3, 3]) == (0, 255, 128)
    assert tuple(see(data, compat="sd-scripts")[3, 3]) != (0, 255, 128)


def test_sixteen_bits_are_scaled_not_saturated() -> None:
    ramp = np.linspace(0, 65535, 64, dtype=np.uint16).reshape(8, 8)
    pixels = see(encoded(Image.fromarray(ramp), "PNG"))
    assert np.array_equal(pixels[..., 0], (ramp // 257).astype(np.uint8))


def test_cmyk_and_a_broken_profile_are_read() -> None:
    assert see(encoded(picture(16, 16).convert("CMYK"), "JPEG")).shape == (16, 16, 3)
    data = encoded(picture(16, 16), "PNG", icc_profile=b"no profile at all")
    assert np.array_equal(see(data), np.array(picture(16, 16)))


def test_an_srgb_profile_changes_nothing_but_rounding() -> None:
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    pixels = see(encoded(picture(16, 16), "PNG", icc_profile=profile))
    assert np.abs(pixels.astype(int) - np.array(picture(16, 16)).astype(int)).max() <= 2


def swapped_profile() -> bytes:
    """sRGB's profile with red and green primaries exchanged."""
    data = bytearray(ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes())
    (count,) = struct.unpack_from(">I", data, 128)
    tags = {bytes(data[at : at + 4]): at for at in range(132, 132 + 12 * count, 12)}
    red, green = (tags[name] + 4 for name in (b"rXYZ", b"gXYZ"))
    data[red : red + 8], data[green : green + 8] = data[green : green + 8], data[red : red + 8]
    return bytes(data)


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP"])
def test_an_embedded_profile_is_converted_to_srgb(kind: str) -> None:
    """What the file calls red is green on the screen."""
    data = encoded(Image.new("RGB", (16, 16), (250, 10, 10)), kind, icc_profile=swapped_profile())
    red, green, blue = see(data)[8, 8].tolist()
    assert green > 200 > 80 > max(red, blue)
    red, green, blue = see(data, compat="sd-scripts")[8, 8].tolist()
    assert red > 200 > 80 > max(green, blue)


def test_the_first_frame_of_an_animation_is_taken() -> None:
    frames = [picture(16, 16, seed=seed) for seed in range(3)]
    data = encoded(frames[0], "WEBP", save_all=True, append_images=frames[1:], lossless=True)
    assert np.array_equal(see(data), np.array(frames[0]))


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP", "BMP"])
@settings(max_examples=25, deadline=None)
@given(share=st.floats(0.01, 0.97), seed=st.integers(0, 5))
def test_a_file_cut_anywhere_is_a_bad_picture_or_the_whole_one(kind: str, share: float, seed: int) -> None:
    data = encoded(picture(64, 64, seed=seed), kind)
    cut = data[: int(len(data) * share)]
    with pytest.raises(BadPicture) as caught:
        see(cut)
    assert caught.value.reason in ("undecodable", "empty_file")


@settings(max_examples=200, deadline=None)
@given(
    kind=st.sampled_from(["PNG", "JPEG", "WEBP", "BMP", "GIF"]),
    position=st.integers(0, 10_000),
    value=st.integers(0, 255),
)
def test_a_flipped_byte_never_raises_anything_else(kind: str, position: int, value: int) -> None:
    data = bytearray(encoded(picture(48, 32), kind))
    data[position % len(data)] = value
    try:
        assert see(bytes(data)).ndim == 3
    except BadPicture as error:
        assert error.reason == "undecodable"


def judge(data: bytes, **options: float) -> str:
    """The reason a file is rejected for before it is decoded, "" where it is not."""
    config = LatentsOptions(**options)
    try:
        choose_bucket(probe(data, honour_exif=True), BucketTable.from_options(config), config)
    except BadPicture as error:
        return error.reason
    return ""


def test_pictures_that_are_not_worth_decoding_are_told_from_their_header() -> None:
    assert judge(b"") == "empty_file"
    assert judge(b"\0" * 500) == "undecodable"
    assert judge(bomb(30_000, 30_000)) == "too_large"
    assert judge(bomb(4000, 1)) == "too_small"
    assert judge(bomb(4000, 40)) == "extreme_aspect"
    assert judge(bomb(4000, 40), max_cropped_share=1) == ""
    assert judge(encoded(picture(31, 64), "PNG")) == "too_small"
    assert judge(encoded(picture(32, 64), "PNG")) == ""
    assert judge(encoded(picture(60, 64), "PNG"), no_upscale=True) == "too_small"


def test_only_picture_formats_are_opened_whatever_the_name_says() -> None:
    postscript = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 64 64\n%%EndComments\nshowpage\n"
    for look in (lambda: probe(postscript, honour_exif=True), lambda: see(postscript)):
        with pytest.raises(BadPicture, match="not a picture"):
            look()


def test_a_garbage_exif_block_does_not_cost_the_picture() -> None:
    plain = picture(40, 30, seed=1)
    data = io.BytesIO()
    plain.save(data, "WEBP", lossless=True, exif=b"Exif\0\0garbage that is no TIFF header")
    assert np.array_equal(see(data.getvalue()), np.asarray(plain))
