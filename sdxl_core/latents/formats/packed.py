"""Latents of many pictures of one bucket in one immutable `.npz`, each picture read with one call per array.

Members, all stored (so `np.load` reads the file whole, and a row is at an offset that can be computed):
    latents         float16 or float32 [N, 4, h, w]
    latents_flipped as latents, alpha_mask uint8 [N, 8 h, 8 w], logvar as latents: where the pictures have them
    crc32           uint32 [N], over the row's bytes in latents, latents_flipped, alpha_mask, logvar, in this order
    keys            uint8, all keys in UTF-8 one after another;   key_offsets  int64 [N + 1]
    original_size   int64 [N, 2], width and height;   crop_ltrb  float64 [N, 4];   image_sha256  uint8 [N, 32]
"""

from __future__ import annotations

import os
import struct
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from itertools import count
from math import prod
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from sdxl_core.errors import DataError, ShardError
from sdxl_core.files import write_vectored
from sdxl_core.latents.formats.checksum import crc32, crc32_each, joined
from sdxl_core.latents.formats.record import LatentRecord, Latents, Scratch, WrittenFile, cast, is_finite
from sdxl_core.latents.formats.zipstore import (
    CENTRAL,
    END,
    FIRST_HEADER,
    NPY_HEADER_BYTES,
    Spec,
    ZipLayout,
    parse_npy_header,
    plan_layout,
)

PackedDtype = Literal["float16", "float32"]
REPAIR = "Run `sdxl-flows verify` with --repair on this cache: it encodes exactly what is damaged again."
TAIL_BYTES = 1 << 16  # what is read at first: everything but the rows of a file of some hundred pictures
BIG = ("latents", "latents_flipped", "alpha_mask", "logvar")
UNKNOWN_SHA256 = bytes(32)
BLOCK_BYTES = 1 << 19  # what `verify` reads at once: little enough to stay in a core's cache
_SCRATCH = Scratch()


def packed_name(digest: str, number: int, *, width_px: int, height_px: int, taken: Collection[str]) -> str:
    """The file of a commit group's pictures of one bucket, POSIX path relative to the latents folder.

    Args:   digest, number: of the shard, of the group.   taken: names that hold committed rows, which stay as they are.
    """
    stem = f"packed/{width_px}x{height_px}/{digest[:16]}-{number}"
    return next(name for name in (f"{stem}{f'.{n}' if n else ''}.npz" for n in count()) if name not in taken)


def write_packed(path: Path, keys: Sequence[str], records: Sequence[LatentRecord], dtype: PackedDtype) -> WrittenFile:
    """Write atomically; the caller syncs. Rows keep the order given.

    Args:   records: of one bucket, all with the same arrays.   dtype: of latents and logvar; float16 keeps about three
            digits of a float32, float32 keeps a float16 as it is.
    Raises: DataError: values too large for float16; pictures that do not belong together.   DiskFullError.
    """
    casts = [array for record in records for name, array in record.arrays() if name != "alpha_mask"]
    casts = [array for array in casts if array.dtype != dtype and array.shape == records[0].latents.shape]
    shape = records[0].latents.shape
    room = iter(_SCRATCH.arrays(shape, dtype, len(casts)))
    rows = [_row_arrays(path, key, record, dtype, shape, room) for key, record in zip(keys, records, strict=True)]
    names = [name for name, _ in rows[0]]
    shapes = [(array.dtype.str, array.shape) for _, array in rows[0]]
    checksums: list[int] = []
    totals = [0] * len(names)
    for key, row in zip(keys, rows, strict=True):
        if [name for name, _ in row] != names or [(array.dtype.str, array.shape) for _, array in row] != shapes:
            raise DataError(f"{path}: {key!r} has other arrays or another bucket than {keys[0]!r}. Pack it elsewhere.")
        checksum = 0
        for number, one in enumerate(crc32_each(array for _, array in row)):
            checksum = joined(checksum, one, row[number][1].nbytes)
            totals[number] = joined(totals[number], one, row[number][1].nbytes)
        checksums.append(checksum)
    payloads: list[list[Any]] = [[row[number][1] for row in rows] for number in range(len(names))]
    specs: list[Spec] = [(name, dtype, (len(rows), *shape)) for name, (dtype, shape) in zip(names, shapes, strict=True)]
    small = _small_arrays(keys, records, checksums)
    payloads += [[array] for _, array in small]
    specs += [(name, array.dtype.str, array.shape) for name, array in small]
    layout = plan_layout(specs)
    heads, tail, whole = layout.around([*totals, *crc32_each(array for _, array in small)])
    pieces = [piece for head, payload in zip(heads, payloads, strict=True) for piece in (head, *payload)]
    write_vectored(path, [*pieces, tail])
    return WrittenFile(num_bytes=layout.num_bytes, crc32=whole, row_crc32s=tuple(checksums))


def _row_arrays(
    path: Path, key: str, record: LatentRecord, dtype: str, shape: tuple[int, ...], room: Iterator[Latents]
) -> list[tuple[str, NDArray[Any]]]:
    arrays: list[tuple[str, NDArray[Any]]] = []
    for name, array in record.arrays():
        if name == "alpha_mask" or array.dtype == dtype:
            values = np.ascontiguousarray(array)
        else:
            values = cast(array, dtype, out=next(room) if array.shape == shape else None)
        if values.dtype == np.float16 and array.dtype != np.float16 and not is_finite(values) and is_finite(array):
            raise DataError(
                f"{path}: {name} of {key!r} reach {np.abs(array).max():.6g}, and float16 ends at 65504. "
                f"Pack with float32."
            )
        arrays.append((name, values))
    return arrays


def _small_arrays(
    keys: Sequence[str], records: Sequence[LatentRecord], row_crc32s: list[int]
) -> list[tuple[str, NDArray[Any]]]:
    texts = [key.encode("utf-8", "surrogateescape") for key in keys]
    digests = b"".join([record.image_sha256 or UNKNOWN_SHA256 for record in records])
    sizes = [(record.original_width_px, record.original_height_px) for record in records]
    return [
        ("crc32", np.array(row_crc32s, dtype=np.uint32)),
        ("keys", np.frombuffer(b"".join(texts), dtype=np.uint8)),
        ("key_offsets", np.cumsum([0, *map(len, texts)], dtype=np.int64)),
        ("original_size", np.array(sizes, dtype=np.int64).reshape(-1, 2)),
        ("crop_ltrb", np.array([record.crop_ltrb for record in records], dtype=np.float64).reshape(-1, 4)),
        ("image_sha256", np.frombuffer(digests, dtype=np.uint8).reshape(-1, 32)),
    ]


@dataclass(frozen=True, slots=True, kw_only=True)
class PackedCheck:
    """What reading a whole file found.

    crc32: over every byte.   damaged_rows: rows with other bytes than were written.   infinite_rows: rows with values
    that are not finite.   is_damaged: a checksum or header does not fit, be it of a row or of something else.
    """

    crc32: int
    damaged_rows: tuple[int, ...]
    infinite_rows: tuple[int, ...]
    is_damaged: bool


class PackedFile:
    """An open packed file. Threads may share it, and processes forked from this one; it closes when let go of.

    num_rows, num_bytes; row_crc32s: uint32 [N]; original_sizes: int64 [N, 2]; crops_ltrb: float64 [N, 4];
    image_sha256s: uint8 [N, 32].
    """

    def __init__(self, path: Path | str) -> None:
        """Raises: ShardError: missing, torn, or anything but the pictures' rows is damaged."""
        self.path = path
        try:
            self._handle = os.open(path, os.O_RDONLY)
        except (FileNotFoundError, NotADirectoryError) as error:
            raise ShardError(f"{path}: the latents are gone. {REPAIR}") from error
        except OSError as error:
            raise self._unreadable(error) from error
        try:
            self.num_bytes = os.fstat(self._handle).st_size
            small = self._open()
        except OSError as error:
            raise self._unreadable(error) from error
        except (ValueError, SyntaxError, KeyError, IndexError, TypeError, struct.error, OverflowError) as error:
            raise self._damaged(str(error)) from error
        self.row_crc32s, self.original_sizes = small["crc32"], small["original_size"]
        self.crops_ltrb, self.image_sha256s = small["crop_ltrb"], small["image_sha256"]
        self._keys, self._key_offsets = small["keys"].tobytes(), small["key_offsets"]
        self.num_rows = len(self.row_crc32s)

    def __del__(self) -> None:
        if hasattr(self, "_handle"):
            os.close(self._handle)

    @property
    def bucket(self) -> tuple[int, int]:
        """Width and height of the bucket in pixels."""
        _, _, height, width = self._big[0].shape
        return 8 * width, 8 * height

    @property
    def dtype(self) -> np.dtype[Any]:
        """Of latents and logvar."""
        return self._big[0].dtype

    @property
    def array_names(self) -> tuple[str, ...]:
        """Which of latents, latents_flipped, alpha_mask and logvar its rows have."""
        return tuple(member.name for member in self._big)

    def key(self, row: int) -> str:
        start, stop = self._key_offsets[row : row + 2]
        return self._keys[start:stop].decode("utf-8", "surrogateescape")

    @property
    def keys(self) -> list[str]:
        return [self.key(row) for row in range(self.num_rows)]

    def row(self, row: int) -> LatentRecord:
        """A picture's latents, read and checked.

        Raises: ShardError: its bytes are not those that were written.   IndexError: no such row.
        """
        if not 0 <= row < self.num_rows:
            raise IndexError(f"{self.path}: has {self.num_rows} rows, not row {row}")
        arrays: dict[str, NDArray[Any]] = {}
        checksum = 0
        for member in self._big:
            array = np.empty(member.shape[1:], member.dtype)
            self._read(array, member.start + row * array.nbytes)
            checksum = crc32(array, checksum)
            arrays[member.name] = array
        if checksum != self.row_crc32s[row]:
            raise self._damaged(f"row {row}, {self.key(row)!r}, holds other bytes than were written")
        return self._record(row, arrays)

    def _read(self, array: NDArray[Any], start: int) -> None:
        """Fill an array with what begins at `start`."""
        try:
            if os.preadv(self._handle, [array.data], start) != array.nbytes:
                raise self._damaged("it ends within its rows")
        except OSError as error:
            raise self._unreadable(error) from error

    def _bytes(self, start: int, stop: int) -> bytes:
        try:
            return os.pread(self._handle, stop - start, start)
        except OSError as error:
            raise self._unreadable(error) from error

    def _record(self, row: int, arrays: dict[str, NDArray[Any]]) -> LatentRecord:
        width_px, height_px = self.original_sizes[row].tolist()
        digest = self.image_sha256s[row].tobytes()
        return LatentRecord(
            original_width_px=width_px,
            original_height_px=height_px,
            crop_ltrb=tuple(self.crops_ltrb[row].tolist()),
            image_sha256=b"" if digest == UNKNOWN_SHA256 else digest,
            **arrays,
        )

    def verify(self) -> PackedCheck:
        """Read every byte and hold it against every checksum."""
        whole, row_crc32s, is_damaged = 0, [0] * self.num_rows, False
        infinite: set[int] = set()
        for member, recorded in zip(self._big, self._checksums, strict=False):
            head = self._bytes(member.head_start, member.start)
            whole, checksum = crc32(head, whole), crc32(member.npy_header)
            num_bytes = member.dtype.itemsize * prod(member.shape[1:])
            block = np.empty((max(1, BLOCK_BYTES // num_bytes), *member.shape[1:]), member.dtype)
            for first in range(0, self.num_rows, len(block)):
                rows = block[: self.num_rows - first]
                self._read(rows, member.start + first * num_bytes)
                for number, found in enumerate(crc32_each(rows), first):
                    row_crc32s[number] = joined(row_crc32s[number], found, num_bytes)
                    checksum = joined(checksum, found, num_bytes)
                    whole = joined(whole, found, num_bytes)
                if not is_finite(rows):
                    infinite.update(first + at for at, row in enumerate(rows) if not is_finite(row))
            is_damaged |= checksum != recorded or head != member.head(recorded)
        rest = self._bytes(self._rest_start, self.num_bytes)
        damaged = np.flatnonzero(np.array(row_crc32s, np.uint32) != self.row_crc32s)
        return PackedCheck(
            crc32=crc32(rest, whole),
            damaged_rows=tuple(damaged.tolist()),
            infinite_rows=tuple(sorted(infinite)),
            is_damaged=is_damaged or rest != self._rest,
        )

    def _open(self) -> dict[str, NDArray[Any]]:
        """Read all but the rows. Raises: ValueError, KeyError, … : the file is not one of ours, or not whole."""
        head = os.pread(self._handle, FIRST_HEADER.stop, 0)
        rest_start = max(0, self.num_bytes - TAIL_BYTES)
        rest = os.pread(self._handle, TAIL_BYTES, rest_start)
        signature, *_, directory_bytes, directory_start, _ = END.unpack(rest[-END.size :])
        entries = _directory(rest[-END.size - directory_bytes : -END.size])
        num_big = sum(name in BIG for name, _, _ in entries)
        layout, self._checksums = _layout(head[FIRST_HEADER], entries), [checksum for _, checksum, _ in entries]
        if (signature, directory_start, self.num_bytes) != (b"PK\5\6", layout.tail_start, layout.num_bytes):
            raise ValueError(f"it has {self.num_bytes} bytes where {layout.num_bytes} fit its directory")
        self._big, small = layout.members[:num_big], layout.members[num_big:]
        self._rest_start = small[0].head_start
        if self._rest_start < rest_start:
            rest = self._bytes(self._rest_start, self.num_bytes)
        self._rest = rest[len(rest) - self.num_bytes + self._rest_start :]
        for member, checksum in zip(self._big, self._checksums, strict=False):
            if self._bytes(member.head_start, member.start) != member.head(checksum):
                raise ValueError(f"the header of {member.name} is damaged")
        return dict(_small_members(self._rest, self._rest_start, layout, self._checksums, num_big))

    def _unreadable(self, error: OSError) -> ShardError:
        return ShardError(f"{self.path}: cannot be read ({error.strerror}). {REPAIR}")

    def _damaged(self, how: str) -> ShardError:
        return ShardError(f"{self.path}: not a whole packed file of latents ({how}). {REPAIR}")


def _directory(data: bytes) -> list[tuple[str, int, int]]:
    """(member, checksum, bytes) of each entry of a central directory."""
    entries, offset = [], 0
    while offset < len(data):
        fields = CENTRAL.unpack_from(data, offset)
        checksum, num_bytes, name_bytes = fields[8], fields[10], fields[11]
        offset += CENTRAL.size
        entries.append((data[offset : offset + name_bytes].decode().removesuffix(".npy"), checksum, num_bytes))
        offset += name_bytes
    return entries


def _layout(npy_header: bytes, entries: Sequence[tuple[str, int, int]]) -> ZipLayout:
    """What a file with this first array and these members looks like."""
    dtype, (rows, channels, height, width) = parse_npy_header(npy_header)
    if channels != 4 or dtype not in ("<f2", "<f4"):
        raise ValueError(f"its latents are {dtype} with {channels} channels")
    key_bytes = {name: num_bytes for name, _, num_bytes in entries}["keys"] - NPY_HEADER_BYTES
    known: dict[str, Spec] = {
        "latents": ("latents", dtype, (rows, 4, height, width)),
        "latents_flipped": ("latents_flipped", dtype, (rows, 4, height, width)),
        "alpha_mask": ("alpha_mask", "|u1", (rows, 8 * height, 8 * width)),
        "logvar": ("logvar", dtype, (rows, 4, height, width)),
        "crc32": ("crc32", "<u4", (rows,)),
        "keys": ("keys", "|u1", (key_bytes,)),
        "key_offsets": ("key_offsets", "<i8", (rows + 1,)),
        "original_size": ("original_size", "<i8", (rows, 2)),
        "crop_ltrb": ("crop_ltrb", "<f8", (rows, 4)),
        "image_sha256": ("image_sha256", "|u1", (rows, 32)),
    }
    names = [name for name, _, _ in entries]
    if names != [name for name in known if name in names] or not set(known) - set(BIG[1:]) <= set(names):
        raise ValueError(f"its members are {', '.join(names)}")
    return plan_layout([known[name] for name in names])


def _small_members(
    rest: bytes, rest_start: int, layout: ZipLayout, checksums: Sequence[int], num_big: int
) -> Iterator[tuple[str, NDArray[Any]]]:
    """The arrays behind the rows, checked. Raises: ValueError: a checksum does not fit."""
    if rest[layout.tail_start - rest_start :] != layout.tail(checksums):
        raise ValueError("its directory is damaged")
    for member, checksum in zip(layout.members[num_big:], checksums[num_big:], strict=True):
        start, stop = member.start - rest_start, member.stop - rest_start
        head = rest[member.head_start - rest_start : start]
        if head != member.head(checksum) or crc32(rest[start:stop], member.npy_crc32) != checksum:
            raise ValueError(f"{member.name} is damaged")
        yield member.name, np.frombuffer(rest[start:stop], member.dtype).reshape(member.shape)
