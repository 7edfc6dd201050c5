"""Zip files of stored `.npy` members, byte for byte as np.savez lays them out, planned before a byte is written.

Everything but checksums follows from the members' names, dtypes and shapes, so a file of known shape is written with
one call and read with one, and what a file must hold besides its arrays can be compared instead of parsed.
"""

from __future__ import annotations

import io
import re
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from math import prod

import numpy as np

from sdxl_core.latents.formats.checksum import crc32, crc32_each, joined

CENTRAL = struct.Struct("<4sBBHHHHHLLLHHHHHLL")
END = struct.Struct("<4sHHHHLLH")
ZIP64 = struct.Struct("<HHQQ")
LOCAL_FIXED = struct.Struct("<4sHHHHHLLLHH")
LOCAL_CRC, ENTRY_CRC = slice(14, 18), slice(16, 20)  # where the two kinds of header have the checksum
DATE = 0x21  # 1980-01-01, what np.savez gives every member
VERSION, UNIX, MODE = 45, 3, 0o600 << 16
NPY_HEADER_BYTES = 128
FIRST_HEADER = slice(61, 61 + NPY_HEADER_BYTES)  # numpy's header of the first member, where that is "latents"
MAX_BYTES = 2**31  # beyond, zip needs other records; no packed file is meant to be that large

Spec = tuple[str, str, tuple[int, ...]]  # name, dtype as "<f4", shape
_NPY = re.compile(
    rb"\x93NUMPY\x01\x00v\x00\{'descr': '([<|]\w\d)', 'fortran_order': False, 'shape': \(([\d, ]*)\), \} *\n"
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Member:
    """One array of a file.

    head_start, start, stop: offsets of its local header, of its payload and of the payload's end.
    npy_header, npy_crc32: numpy's header of the array and its checksum.
    local, entry: what is before and behind the checksum in the head, and in the entry of the central directory.
    """

    name: str
    dtype: np.dtype[np.generic]
    shape: tuple[int, ...]
    head_start: int
    start: int
    stop: int
    npy_header: bytes
    npy_crc32: int
    local: tuple[bytes, bytes]
    entry: tuple[bytes, bytes]

    def head(self, checksum: int) -> bytes:
        """Local header and numpy's header. `checksum`: over numpy's header and the payload."""
        return checksum.to_bytes(4, "little").join(self.local)

    def central(self, checksum: int) -> bytes:
        return checksum.to_bytes(4, "little").join(self.entry)


@dataclass(frozen=True, slots=True, kw_only=True)
class ZipLayout:
    """Where everything of a file lies. `tail_start`: of the central directory."""

    members: tuple[Member, ...]
    tail_start: int
    num_bytes: int

    def tail(self, checksums: Sequence[int]) -> bytes:
        """Central directory and end record."""
        entries = b"".join([member.central(checksum) for member, checksum in zip(self.members, checksums, strict=True)])
        count = len(self.members)
        return entries + END.pack(b"PK\5\6", 0, 0, count, count, len(entries), self.tail_start, 0)

    def around(self, payload_crc32s: Sequence[int]) -> tuple[list[bytes], bytes, int]:
        """What a file with these payloads has besides: each member's head, and the tail; and the CRC-32 of it all."""
        sizes = [member.stop - member.start for member in self.members]
        checksums = [
            joined(member.npy_crc32, payload, size)
            for member, payload, size in zip(self.members, payload_crc32s, sizes, strict=True)
        ]
        heads = [member.head(checksum) for member, checksum in zip(self.members, checksums, strict=True)]
        tail = self.tail(checksums)
        *head_crc32s, tail_crc32 = crc32_each([*heads, tail])
        whole = 0
        for head, head_crc32, payload, size in zip(heads, head_crc32s, payload_crc32s, sizes, strict=True):
            whole = joined(joined(whole, head_crc32, len(head)), payload, size)
        return heads, tail, joined(whole, tail_crc32, len(tail))


@lru_cache(maxsize=1024)
def zip_layout(specs: tuple[Spec, ...]) -> ZipLayout:
    """The layout of a file with these members, kept for the next file like it."""
    return plan_layout(specs)


def plan_layout(specs: Sequence[Spec]) -> ZipLayout:
    """The layout of a file with these members. Raises: ValueError: larger than a file may be."""
    members: list[Member] = []
    offset = tail = 0
    for name, dtype, shape in specs:
        npy_header = _npy_header(dtype, shape)
        start = offset + LOCAL_FIXED.size + len(name) + 4 + ZIP64.size + len(npy_header)
        stop = start + np.dtype(dtype).itemsize * prod(shape)
        member_bytes = len(npy_header) + stop - start
        members.append(
            Member(
                name=name,
                dtype=np.dtype(dtype),
                shape=shape,
                head_start=offset,
                start=start,
                stop=stop,
                npy_header=npy_header,
                npy_crc32=crc32(npy_header),
                local=_local(f"{name}.npy".encode(), member_bytes, npy_header),
                entry=_entry(f"{name}.npy".encode(), member_bytes, offset),
            )
        )
        offset, tail = stop, tail + CENTRAL.size + len(name) + 4
    if offset + tail + END.size >= MAX_BYTES:
        raise ValueError(f"{offset + tail + END.size} bytes are too many for one file")
    return ZipLayout(members=tuple(members), tail_start=offset, num_bytes=offset + tail + END.size)


def _local(name: bytes, num_bytes: int, npy_header: bytes) -> tuple[bytes, bytes]:
    fixed = LOCAL_FIXED.pack(b"PK\3\4", VERSION, 0, 0, 0, DATE, 0, 0xFFFFFFFF, 0xFFFFFFFF, len(name), ZIP64.size)
    before, after = fixed[: LOCAL_CRC.start], fixed[LOCAL_CRC.stop :]
    return before, after + name + ZIP64.pack(1, 16, num_bytes, num_bytes) + npy_header


def _entry(name: bytes, num_bytes: int, head_start: int) -> tuple[bytes, bytes]:
    fixed = CENTRAL.pack(
        b"PK\1\2", VERSION, UNIX, VERSION, 0, 0, 0, DATE, 0, num_bytes, num_bytes, len(name),
        0, 0, 0, 0, MODE, head_start,
    )  # fmt: skip
    return fixed[: ENTRY_CRC.start], fixed[ENTRY_CRC.stop :] + name


def parse_npy_header(header: bytes) -> tuple[str, tuple[int, ...]]:
    """Dtype and shape of an array, from numpy's header of NPY_HEADER_BYTES.

    Not with ast.literal_eval, which fails at random where several threads parse at once (seen with Python 3.11.7:
    SystemError, "AST constructor recursion depth mismatch").
    Raises: ValueError: not such a header.
    """
    found = _NPY.fullmatch(header)
    if found is None:
        raise ValueError("the header of its first array is damaged")
    return found[1].decode(), tuple(int(side) for side in found[2].split(b",") if side.strip())


@lru_cache(maxsize=4096)
def _npy_header(dtype: str, shape: tuple[int, ...]) -> bytes:
    """As numpy writes it; long enough a shape would make it longer than NPY_HEADER_BYTES, ours never are."""
    buffer = io.BytesIO()
    np.lib.format.write_array_header_1_0(buffer, {"descr": dtype, "fortran_order": False, "shape": shape})
    return buffer.getvalue()
