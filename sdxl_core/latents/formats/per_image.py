"""One picture's latents in one file: the `.npz` that sd-scripts writes and reads, byte for byte what np.savez gives."""

from __future__ import annotations

import io
import os
import struct
import threading
import zipfile
import zlib
from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from sdxl_core.errors import ShardError
from sdxl_core.files import write_vectored
from sdxl_core.latents.formats.checksum import crc32, crc32_each, joined
from sdxl_core.latents.formats.record import LatentRecord, WrittenFile, cast
from sdxl_core.latents.formats.zipstore import (
    END,
    FIRST_HEADER,
    LOCAL_CRC,
    Spec,
    ZipLayout,
    parse_npy_header,
    zip_layout,
)

Naming = Literal["stem", "size"]
MISSING = "Run cache-latents again: only what is missing is encoded."
REPAIR = "Delete it and run cache-latents again: only what is missing is encoded."
HEAD = 3  # bytes in front of the file's in memory, so that the first member's payload is aligned to 64 bytes
OPACITY = np.arange(256, dtype=np.float32) / np.float32(255)  # sd-scripts' alpha_mask of an alpha value
_one_parses = threading.Lock()  # numpy parses headers in a way that no two threads may, see `parse_npy_header`
OPTIONAL = ("latents_flipped", "alpha_mask", "logvar")


def per_image_name(stem: str, naming: Naming, *, width_px: int, height_px: int) -> str:
    """The file of a picture, POSIX path relative to the latents folder.

    Args:   stem: the picture's path without its extension.   naming: `stem` as sd-scripts' fine-tuning scripts have it,
            `size` as its trainer's cache.   width_px, height_px: of the source picture.
    Source: sd-scripts `SdSdxlLatentsCachingStrategy.get_latents_npz_path`.
    """
    return f"{stem}.npz" if naming == "stem" else f"{stem}_{width_px:04d}x{height_px:04d}_sdxl.npz"


def write_per_image(path: Path, record: LatentRecord) -> WrittenFile:
    """Write atomically; the caller syncs. Latents are written as float32, alpha masks as float32 in 0 … 1.

    `image_sha256` has no place in this format.
    Raises: DiskFullError, DataError (no permission).
    """
    arrays = _arrays(record)
    layout = zip_layout(tuple((name, array.dtype.str, array.shape) for name, array in arrays))
    heads, tail, checksum = layout.around(crc32_each(array for _, array in arrays))
    pieces: list[Any] = [piece for head, (_, array) in zip(heads, arrays, strict=True) for piece in (head, array)]
    write_vectored(path, [*pieces, tail])
    return WrittenFile(num_bytes=layout.num_bytes, crc32=checksum, row_crc32s=(checksum,))


def _arrays(record: LatentRecord) -> list[tuple[str, NDArray[Any]]]:
    """Names and arrays in the order in which sd-scripts hands them to np.savez."""
    latents, *optional = [
        (name, OPACITY[array] if name == "alpha_mask" else cast(array, "float32")) for name, array in record.arrays()
    ]
    size = np.array([record.original_width_px, record.original_height_px], dtype=np.int64)
    return [latents, ("original_size", size), ("crop_ltrb", np.array(record.crop_ltrb, dtype=np.float64)), *optional]


def read_per_image(path: Path | str, *, expected_crc32: int | None = None, exact: bool = False) -> LatentRecord:
    """Read and check a file of ours or of sd-scripts; never unpickles.

    Args:   expected_crc32: of the whole file; without it, the file's own checksums are what it is held against.
            exact: refuse arrays that a LatentRecord cannot hold as they are: float64 latents, and masks that are no
            255ths (else rounded).
    Raises: ShardError: missing, torn, a checksum that does not fit, or not a latent file.
    """
    return _parse(path, _read_whole(path), expected_crc32, exact)


def inspect_per_image(path: Path | str) -> tuple[LatentRecord, WrittenFile]:
    """As `read_per_image` with `exact`, and what `write_per_image` would have said of the file."""
    data = _read_whole(path)
    checksum = crc32(data)
    record = _parse(path, data, None, exact=True)
    return record, WrittenFile(num_bytes=len(data), crc32=checksum, row_crc32s=(checksum,))


def _parse(path: Path | str, data: NDArray[np.uint8], expected_crc32: int | None, exact: bool) -> LatentRecord:
    if expected_crc32 is not None and crc32(data) != expected_crc32:
        raise ShardError(f"{path}: holds other bytes than were committed. {REPAIR}")
    layout = _layout_of(len(data), data[FIRST_HEADER].tobytes())
    if layout is not None and _is_whole(data, layout, sums_are_checked=expected_crc32 is not None):
        arrays = {m.name: data[m.start : m.stop].view(m.dtype).reshape(m.shape) for m in layout.members}
    else:
        arrays = _foreign_arrays(path, data)
    record = _record(path, arrays)
    if exact:
        _check_exact(path, arrays, record)
    return record


def _check_exact(path: Path | str, arrays: Mapping[str, NDArray[Any]], record: LatentRecord) -> None:
    for name, array in arrays.items():
        if name in ("latents", "latents_flipped", "logvar") and array.dtype not in (np.float32, np.float16):
            raise ShardError(f"{path}: its {name} are {array.dtype}; SDXL latents are float32. Encode it again.")
    if record.alpha_mask is not None and not np.array_equal(OPACITY[record.alpha_mask], arrays["alpha_mask"]):
        raise ShardError(f"{path}: its alpha_mask is not alpha / 255, as sd-scripts makes it. Encode it again.")


def _read_whole(path: Path | str) -> NDArray[np.uint8]:
    """A file's bytes, so placed in memory that the first array in it is aligned."""
    try:
        handle = os.open(path, os.O_RDONLY)
    except (FileNotFoundError, NotADirectoryError) as error:
        raise ShardError(f"{path}: the latents are gone. {MISSING}") from error
    except OSError as error:
        raise ShardError(f"{path}: cannot be read ({error.strerror}). {REPAIR}") from error
    try:
        size = os.fstat(handle).st_size
        data = np.empty(HEAD + size, np.uint8)[HEAD:]
        done = os.readv(handle, [data.data])
        while done < size and (more := os.readv(handle, [data[done:].data])):
            done += more
    except OSError as error:
        raise ShardError(f"{path}: cannot be read ({error}). {REPAIR}") from error
    finally:
        os.close(handle)
    return data[:done]


@lru_cache(maxsize=1024)
def _layout_of(num_bytes: int, npy_header: bytes) -> ZipLayout | None:
    """The layout of a file of this size whose first member has this header, None where it is none of ours.

    Masks and latents are never of one size, so the size tells which members there are.
    """
    try:
        dtype, (channels, height, width) = parse_npy_header(npy_header)
    except ValueError:
        return None
    if channels != 4 or dtype != "<f4" or height * width * 16 > num_bytes:
        return None
    for flags in range(8):
        specs = _specs(channels, height, width, [name for bit, name in enumerate(OPTIONAL) if flags >> bit & 1])
        layout = zip_layout(specs)
        if layout.num_bytes == num_bytes and layout.members[0].npy_header == npy_header:
            return layout
    return None


def _specs(channels: int, height: int, width: int, optional: list[str]) -> tuple[Spec, ...]:
    shape = (channels, height, width)
    fixed: list[Spec] = [("latents", "<f4", shape), ("original_size", "<i8", (2,)), ("crop_ltrb", "<f8", (4,))]
    return tuple(
        fixed + [(name, "<f4", (8 * height, 8 * width) if name == "alpha_mask" else shape) for name in optional]
    )


def _is_whole(data: NDArray[np.uint8], layout: ZipLayout, *, sums_are_checked: bool) -> bool:
    """Whether all checksums fit and everything besides the arrays is what it must be.

    Args:   sums_are_checked: the whole file has the checksum it was written with, and so has each array.
    """
    if sums_are_checked:  # then only a file of another writer is to be told from ours
        return all(data[m.head_start + LOCAL_CRC.stop : m.start].tobytes() == m.local[1] for m in layout.members)
    payloads = crc32_each(data[m.start : m.stop] for m in layout.members)
    checksums = [
        joined(m.npy_crc32, payload, m.stop - m.start) for m, payload in zip(layout.members, payloads, strict=True)
    ]
    return data[layout.tail_start :].tobytes() == layout.tail(checksums) and all(
        data[m.head_start : m.start].tobytes() == m.head(checksum)
        for m, checksum in zip(layout.members, checksums, strict=True)
    )


def _foreign_arrays(path: Path | str, data: NDArray[np.uint8]) -> dict[str, NDArray[Any]]:
    """The arrays of an `.npz` written otherwise (compressed, in another order, on another system).

    All members are read, and with that their checksums and names checked, and counted: no damage may hide a member.
    """
    try:
        with zipfile.ZipFile(io.BytesIO(data.data)) as archive:
            members = {name.removesuffix(".npy"): archive.read(name) for name in archive.namelist()}
        if len(members) != _num_members(data):
            raise ValueError("its directory is damaged")
        with _one_parses:
            return {
                plain: np.lib.format.read_array(io.BytesIO(members[name]), allow_pickle=False)
                for plain, name in _wanted_names(set(members)).items()
            }
    except (
        OSError, ValueError, KeyError, EOFError, IndexError, TypeError, RuntimeError, OverflowError, MemoryError,
        struct.error, zipfile.BadZipFile, zlib.error,
    ) as error:  # fmt: skip
        raise ShardError(f"{path}: not a whole latent file ({error}). {REPAIR}") from error


def _num_members(data: NDArray[np.uint8]) -> int:
    """What the end record of a zip file says."""
    tail = data[-END.size - 0xFFFF :].tobytes()
    return END.unpack_from(tail, tail.rindex(b"PK\5\6"))[4]  # type: ignore[no-any-return]


def _wanted_names(names: set[str]) -> dict[str, str]:
    """Which member is which; newer sd-scripts put the latents' size behind each name (`latents_128x128`).

    Raises: ValueError: latents of several sizes.   KeyError: no latents.
    """
    suffixes = {name.removeprefix("latents") for name in names if name.startswith("latents_") and name[8:9].isdigit()}
    if "latents" not in names and len(suffixes) > 1:
        raise ValueError(f"it holds latents of several sizes: {', '.join(sorted(suffixes))}")
    suffix = "" if "latents" in names or not suffixes else suffixes.pop()
    fixed = {name: name + suffix for name in ("latents", "original_size", "crop_ltrb")}
    return fixed | {name: name + suffix for name in OPTIONAL if name + suffix in names}


def _record(path: Path | str, arrays: Mapping[str, NDArray[Any]]) -> LatentRecord:
    latents, size, crop = arrays["latents"], arrays["original_size"], arrays["crop_ltrb"]
    if latents.ndim != 3 or latents.shape[0] != 4 or size.shape != (2,) or crop.shape != (4,):
        raise ShardError(
            f"{path}: its arrays are not SDXL latents (latents are {latents.shape}). Delete it and rerun; where all "
            f"are like that, they are another model's: run cache-latents with SDXL's VAE into another folder."
        )
    others = {name: arrays.get(name) for name in OPTIONAL}
    height_px, width_px = 8 * latents.shape[1], 8 * latents.shape[2]
    for name, array in others.items():
        expected = (height_px, width_px) if name == "alpha_mask" else latents.shape
        if array is not None and array.shape != expected:
            raise ShardError(f"{path}: {name} is {array.shape} where {expected} fits the latents. Delete it and rerun.")
    (width, height), (left, top, right, bottom) = size.tolist(), crop.tolist()
    mask = others["alpha_mask"]
    flipped, logvar = others["latents_flipped"], others["logvar"]
    return LatentRecord(
        latents=_float32(latents),
        original_width_px=int(width),
        original_height_px=int(height),
        crop_ltrb=(float(left), float(top), float(right), float(bottom)),
        latents_flipped=None if flipped is None else _float32(flipped),
        alpha_mask=None if mask is None else alpha_of(mask),
        logvar=None if logvar is None else _float32(logvar),
    )


def _float32(array: NDArray[Any]) -> NDArray[np.float32]:
    """Contiguous and aligned, without a copy where it is so already."""
    if array.dtype == np.float32 and array.flags.carray:
        return array
    return np.require(array, np.float32, ["C", "ALIGNED"])


def alpha_of(opacity: NDArray[np.floating[Any]]) -> NDArray[np.uint8]:
    """Alpha values of sd-scripts' float mask: exact where the mask was made from them, else the nearest."""
    values: NDArray[np.uint8] = np.rint(np.clip(np.nan_to_num(opacity), 0, 1) * 255).astype(np.uint8)
    return values
