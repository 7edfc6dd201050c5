"""The two layouts of latents on disk."""

import os
import zlib
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sdxl_core.errors import DataError, ShardError
from sdxl_core.latents.formats import (
    LatentRecord,
    PackedFile,
    per_image,
    per_image_name,
    read_per_image,
    write_packed,
    write_per_image,
)
from sdxl_core.latents.formats import packed as packed_format
from sdxl_core.latents.formats.record import cast

CROP = (1.0, 0.0, 701.6315789473684, 1024.0)


def record(
    seed: int = 0, height: int = 3, width: int = 2, *, dtype: str = "float32", arrays: tuple[str, ...] = ()
) -> LatentRecord:
    """`arrays`: which of latents_flipped, alpha_mask and logvar it has."""
    rng = np.random.default_rng(seed)
    values = {name: rng.normal(size=(4, height, width)).astype(dtype) for name in ("latents", *arrays)}
    if "alpha_mask" in arrays:
        values["alpha_mask"] = rng.integers(0, 256, (8 * height, 8 * width), dtype=np.uint8)
    return LatentRecord(
        **values, original_width_px=832 + seed, original_height_px=1216, crop_ltrb=CROP, image_sha256=rng.bytes(32)
    )


def sd_scripts_saves(path: Path, item: LatentRecord) -> None:
    """What sd-scripts does with the same arrays: np.savez of float32, the mask as alpha / 255."""
    more: dict[str, Any] = {}
    if item.latents_flipped is not None:
        more["latents_flipped"] = item.latents_flipped
    if item.alpha_mask is not None:
        more["alpha_mask"] = item.alpha_mask.astype(np.float32) / 255.0
    size = np.array([item.original_width_px, item.original_height_px])
    np.savez(path, latents=item.latents, original_size=size, crop_ltrb=np.array(item.crop_ltrb), **more)


def same(one: LatentRecord, other: LatentRecord, *, sha256: bool = False) -> bool:
    arrays, others = dict(one.arrays()), dict(other.arrays())
    return (
        arrays.keys() == others.keys()
        and all(np.array_equal(arrays[name], others[name]) for name in arrays)
        and (one.original_width_px, one.original_height_px) == (other.original_width_px, other.original_height_px)
        and one.crop_ltrb == other.crop_ltrb
        and (not sha256 or one.image_sha256 == other.image_sha256)
    )


FLIP, MASK, LOGVAR = ("latents_flipped",), ("alpha_mask",), ("logvar",)


def flipped_bytes(path: Path) -> Iterator[int]:
    """Every byte of the file in turn with one bit turned, then with all turned; the byte's offset."""
    with open(path, "rb+", buffering=0) as file:
        for position, byte in enumerate(path.read_bytes()):
            for flip in (1 << position % 8, 0xFF, 0):
                os.pwrite(file.fileno(), bytes([byte ^ flip]), position)
                if flip:
                    yield position


SOME_ARRAYS = st.sampled_from([(), FLIP, MASK, LOGVAR, FLIP + MASK, FLIP + MASK + LOGVAR])
side = st.integers(1, 40)


@settings(max_examples=60, deadline=None)
@given(height=side, width=side, arrays=SOME_ARRAYS.filter(lambda names: "logvar" not in names))
def test_a_file_is_byte_for_byte_what_sd_scripts_saves(
    tmp_path_factory: pytest.TempPathFactory, height: int, width: int, arrays: tuple[str, ...]
) -> None:
    folder, item = tmp_path_factory.mktemp("npz"), record(1, height, width, arrays=arrays)
    written = write_per_image(folder / "ours.npz", item)
    sd_scripts_saves(folder / "numpy.npz", item)
    data = (folder / "ours.npz").read_bytes()
    assert data == (folder / "numpy.npz").read_bytes()
    assert written.num_bytes == len(data)
    assert written.crc32 == zlib.crc32(data) == written.row_crc32s[0]
    assert [path.name for path in folder.iterdir() if path.name.startswith(".")] == []


def test_size_is_what_sd_scripts_writes(tmp_path: Path) -> None:
    assert write_per_image(tmp_path / "a.npz", record(height=40, width=24)).num_bytes == 16 * 40 * 24 + 824


def test_both_namings() -> None:
    assert per_image_name("deep/003", "stem", width_px=640, height_px=1216) == "deep/003.npz"
    assert per_image_name("deep/003", "size", width_px=640, height_px=12160) == "deep/003_0640x12160_sdxl.npz"


@settings(max_examples=60, deadline=None)
@given(height=side, width=side, arrays=SOME_ARRAYS)
def test_what_is_read_is_what_was_written(
    tmp_path_factory: pytest.TempPathFactory, height: int, width: int, arrays: tuple[str, ...]
) -> None:
    path, item = tmp_path_factory.mktemp("npz") / "a.npz", record(2, height, width, arrays=arrays)
    written = write_per_image(path, item)
    again = read_per_image(path, expected_crc32=written.crc32)
    assert same(again, item) and again.latents.flags.aligned and again.bucket == (8 * width, 8 * height)
    with np.load(path, allow_pickle=False) as plain:
        assert np.array_equal(plain["latents"], item.latents)


def test_a_row_is_one_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_packed(tmp_path / "a.npz", ["a", "b", "c"], [record(seed) for seed in range(3)], "float16")
    file, reads = PackedFile(tmp_path / "a.npz"), []
    preadv = os.preadv
    monkeypatch.setattr(os, "preadv", lambda *args: (reads.append(args[2]), preadv(*args))[1])
    for name in ("pread", "read", "open"):
        monkeypatch.delattr(os, name)
    assert np.array_equal(file.row(2).latents, record(2).latents.astype(np.float16))
    assert reads == [189 + 2 * 4 * 3 * 2 * 2]


def test_files_of_other_writers_are_read(tmp_path: Path) -> None:
    item = record(arrays=("latents_flipped", "alpha_mask"))
    sd_scripts_saves(tmp_path / "a.npz", item)
    with np.load(tmp_path / "a.npz") as file:
        arrays = dict(file)
    np.savez_compressed(tmp_path / "compressed.npz", **arrays)
    np.savez(tmp_path / "order.npz", **dict(reversed(arrays.items())))
    np.savez(tmp_path / "sizes.npz", **{f"{name}_3x2": array for name, array in arrays.items()})
    for name in ("a", "compressed", "order", "sizes"):
        assert same(read_per_image(tmp_path / f"{name}.npz"), item)


@pytest.mark.parametrize("flags", [(), ("latents_flipped", "alpha_mask")])
def test_a_file_torn_at_any_length_is_refused(tmp_path: Path, flags: tuple[str, ...]) -> None:
    path = tmp_path / "a.npz"
    write_per_image(path, record(height=1, width=1, arrays=flags))
    for length in reversed(range(path.stat().st_size)):
        os.truncate(path, length)
        with pytest.raises(ShardError, match=r"a\.npz"):
            read_per_image(path)


@pytest.mark.parametrize("flags", [(), ("latents_flipped", "alpha_mask")])
def test_no_flipped_byte_changes_what_is_read(tmp_path: Path, flags: tuple[str, ...]) -> None:
    path, item = tmp_path / "a.npz", record(height=1, width=1, arrays=flags)
    written = write_per_image(path, item)
    for _ in flipped_bytes(path):
        with pytest.raises(ShardError, match="other bytes than were committed"):
            read_per_image(path, expected_crc32=written.crc32)
        try:  # without the recorded checksum, what is no part of the arrays may differ (a date, say)
            again = read_per_image(path)
        except ShardError:
            continue
        assert same(again, item)


def test_pickles_are_never_loaded(tmp_path: Path) -> None:
    np.savez(tmp_path / "a.npz", latents=np.array([{}], dtype=object), original_size=[1, 1], crop_ltrb=[0, 0, 0, 0])
    with pytest.raises(ShardError, match="not a whole latent file"):
        read_per_image(tmp_path / "a.npz")


def test_a_missing_file_is_told_from_a_torn_one(tmp_path: Path) -> None:
    with pytest.raises(ShardError, match="are gone"):
        read_per_image(tmp_path / "a.npz")
    with pytest.raises(ShardError, match="are gone"):
        PackedFile(tmp_path / "a.npz")


@settings(max_examples=40, deadline=None)
@given(
    num_rows=st.integers(1, 5), height=side, width=side, arrays=SOME_ARRAYS,
    dtype=st.sampled_from(["float16", "float32"]), names=st.lists(st.text(max_size=9), min_size=5, max_size=5),
)  # fmt: skip
def test_rows_of_a_packed_file_are_what_was_packed(
    tmp_path_factory: pytest.TempPathFactory,
    num_rows: int,
    height: int,
    width: int,
    arrays: tuple[str, ...],
    dtype: Any,
    names: list[str],
) -> None:
    path = tmp_path_factory.mktemp("packed") / "832x1216" / "a.npz"
    items = [record(seed, height, width, dtype=dtype, arrays=arrays) for seed in range(num_rows)]
    keys = [name.encode("utf-8", "replace").decode() for name in names[:num_rows]]
    written = write_packed(path, keys, items, dtype)
    file = PackedFile(path)
    assert file.keys == keys and file.bucket == (8 * width, 8 * height) and file.dtype == dtype
    assert (
        file.row_crc32s.tolist()
        == [zlib.crc32(b"".join(array.tobytes() for _, array in item.arrays())) for item in items]
        == list(written.row_crc32s)
    )
    for row, item in enumerate(items):
        assert same(file.row(row), item, sha256=True) and file.row(row).latents.dtype == dtype
    check = file.verify()
    assert check.crc32 == written.crc32 and not (check.damaged_rows or check.infinite_rows or check.is_damaged)
    with np.load(path, allow_pickle=False) as plain:
        assert np.array_equal(plain["latents"], np.stack([item.latents for item in items]))
        text, offsets = plain["keys"].tobytes(), plain["key_offsets"]
        assert [text[a:b].decode() for a, b in pairwise(offsets)] == keys
        small = ("crc32", "original_size", "crop_ltrb", "image_sha256")
        assert all(len(plain[name]) == num_rows for name in ("latents", *arrays, *small))


def test_float16_is_kept_as_float32_and_the_other_way_round_where_it_fits(tmp_path: Path) -> None:
    half = record(dtype="float16")
    write_packed(tmp_path / "a.npz", ["k"], [half], "float32")
    assert same(PackedFile(tmp_path / "a.npz").row(0), half)
    write_packed(tmp_path / "a.npz", ["k"], [record()], "float16")
    assert np.array_equal(PackedFile(tmp_path / "a.npz").row(0).latents, record().latents.astype(np.float16))
    large = record()
    large.latents[0, 0, 0] = 1e5
    with pytest.raises(DataError, match="float16 ends at 65504"):
        write_packed(tmp_path / "a.npz", ["k"], [large], "float16")


def test_conversion_to_half_precision_is_numpys() -> None:
    bits = np.random.default_rng(0).integers(0, 2**32, 40_000, dtype=np.uint32)
    bits[:2000] = bits[:2000] & 0x80007FFF | 0x38000000  # about the smallest that float16 has
    values = bits.view(np.float32)
    values = values[np.isfinite(values)].reshape(1, -1, 1)
    with np.errstate(over="ignore"):
        assert np.array_equal(cast(values, "float16"), values.astype(np.float16))
    half = np.arange(2**16, dtype=np.uint16).view(np.float16).reshape(1, -1, 1)
    assert np.array_equal(cast(half, "float32"), half.astype(np.float32), equal_nan=True)


def test_pictures_of_two_buckets_share_no_file(tmp_path: Path) -> None:
    for other in (record(height=4), record(arrays=("alpha_mask",))):
        with pytest.raises(DataError, match="'b' has other arrays"):
            write_packed(tmp_path / "a.npz", ["a", "b"], [record(), other], "float32")


@pytest.mark.parametrize("flags", [(), ("latents_flipped", "alpha_mask", "logvar")])
def test_a_flipped_byte_anywhere_in_a_packed_file_is_found_and_never_read(
    tmp_path: Path, flags: tuple[str, ...]
) -> None:
    path = tmp_path / "a.npz"
    items = [record(seed, 1, 1, arrays=flags) for seed in range(2)]
    written = write_packed(path, ["one", "two"], items, "float32")
    for _ in flipped_bytes(path):
        try:
            file = PackedFile(path)
        except ShardError:
            continue  # found when it is opened
        check = file.verify()
        assert check.is_damaged and check.crc32 != written.crc32
        for row, item in enumerate(items):
            if row in check.damaged_rows:
                with pytest.raises(ShardError, match=f"row {row}"):
                    file.row(row)
            else:
                assert same(file.row(row), item, sha256=True)


def test_a_packed_file_torn_at_any_length_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.npz"
    write_packed(path, ["one", "two"], [record(seed, 1, 1) for seed in range(2)], "float16")
    for length in reversed(range(path.stat().st_size)):
        os.truncate(path, length)
        with pytest.raises(ShardError, match=r"a\.npz"):
            PackedFile(path)


def test_a_file_larger_than_what_is_read_at_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(packed_format, "TAIL_BYTES", 800)
    keys = [f"a long name of picture {number}" for number in range(30)]
    write_packed(tmp_path / "a.npz", keys, [record(number, 1, 1) for number in range(30)], "float16")
    file = PackedFile(tmp_path / "a.npz")
    assert file.keys == keys and not file.verify().is_damaged
    with pytest.raises(IndexError):
        file.row(30)


def test_values_that_are_not_finite_are_told_by_row(tmp_path: Path) -> None:
    for dtype in ("float16", "float32"):
        items = [record(seed, dtype=dtype) for seed in range(3)]
        items[1].latents[3, 2, 1] = np.nan
        items[2].latents[0, 0, 0] = np.inf
        write_packed(tmp_path / "a.npz", ["a", "b", "c"], items, dtype)  # type: ignore[arg-type]
        check = PackedFile(tmp_path / "a.npz").verify()
        assert check.infinite_rows == (1, 2) and not check.is_damaged


def test_reading_parses_no_python(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Python 3.11's parser fails at random where threads use it at once, as readers and verify would."""
    record = LatentRecord(
        latents=np.ones((4, 4, 6), np.float32), original_width_px=9, original_height_px=8, crop_ltrb=(0, 0, 1, 1)
    )
    write_per_image(tmp_path / "one.npz", record)
    write_packed(tmp_path / "many.npz", ["a"], [record], "float32")

    def parse(*_: object, **__: object) -> None:
        raise SystemError("AST constructor recursion depth mismatch")

    monkeypatch.setattr("ast.parse", parse)
    per_image._layout_of.cache_clear()
    assert read_per_image(tmp_path / "one.npz").bucket == (48, 32)
    assert PackedFile(tmp_path / "many.npz").row(0).bucket == (48, 32)
