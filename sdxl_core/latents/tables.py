"""Small immutable tables with a few words about them, in one file that is whole or damaged, never half believed.

The file: an Arrow IPC file, then JSON, then a tail with both lengths and checksums. The words can be read without the
table; the table is memory-mapped.
"""

from __future__ import annotations

import os
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import orjson
import pyarrow as pa

from sdxl_core.errors import ShardError
from sdxl_core.files import atomic_writer
from sdxl_core.latents.formats import crc32

_TAIL = struct.Struct("<QIQI8s")  # bytes of the table, its CRC-32, bytes of the JSON, its CRC-32, magic
_MAGIC = b"sdxltab1"


_CHECKED = b'{"crc32":"%08x",'
_BODY_AT = len(_CHECKED % 0)


def checked_json(record: Mapping[str, Any]) -> bytes:
    """An object (not empty) in JSON on one line, with a checksum of itself in front."""
    body = orjson.dumps(record, default=list)  # named tuples
    return _CHECKED % crc32(body) + body[1:]


def parse_checked(line: bytes) -> dict[str, Any] | None:
    """What `checked_json` was given; None where a byte is another than it wrote."""
    body = b"{" + line[_BODY_AT:]
    if line[:_BODY_AT] != _CHECKED % crc32(body):
        return None
    found: dict[str, Any] = orjson.loads(body)
    return found


def write_table(path: Path, batch: pa.RecordBatch, words: Any) -> None:
    """Write both, synced, whole or not at all. Args: words: anything that JSON can say."""
    sink = pa.BufferOutputStream()
    with pa.ipc.new_file(sink, batch.schema) as writer:
        writer.write_batch(batch)
    table, text = sink.getvalue(), orjson.dumps(words)
    with atomic_writer(path) as file:
        file.write(table)
        file.write(text)
        file.write(_TAIL.pack(table.size, crc32(table), len(text), crc32(text), _MAGIC))


def read_words(path: Path) -> Any:
    """What was said about the table, checked. Raises: ShardError: missing or damaged."""
    try:
        with open(path, "rb") as file:
            size = os.fstat(file.fileno()).st_size
            _, _, num_bytes, checksum, magic = _TAIL.unpack(os.pread(file.fileno(), _TAIL.size, size - _TAIL.size))
            if magic != _MAGIC:
                raise ShardError(f"{path}: damaged.")
            text = os.pread(file.fileno(), num_bytes, size - _TAIL.size - num_bytes)
        if len(text) == num_bytes and crc32(text) == checksum:
            return orjson.loads(text)
    except (OSError, OverflowError, MemoryError, struct.error, orjson.JSONDecodeError) as error:
        raise ShardError(f"{path}: gone or damaged ({error}).") from error
    raise ShardError(f"{path}: damaged.")


def read_table(path: Path) -> pa.RecordBatch:
    """The table, memory-mapped, checked. Raises: as `read_words`."""
    try:
        with pa.memory_map(str(path)) as file:
            size = file.size()
            if size >= _TAIL.size:
                file.seek(size - _TAIL.size)
                num_bytes, checksum, _, _, magic = _TAIL.unpack(file.read(_TAIL.size))
                if magic == _MAGIC and num_bytes < size:
                    file.seek(0)
                    table = file.read_buffer(num_bytes)
                    if crc32(table) == checksum:
                        return pa.ipc.open_file(table).get_batch(0)
    except (OSError, pa.ArrowInvalid) as error:
        raise ShardError(f"{path}: gone or damaged ({error}).") from error
    raise ShardError(f"{path}: damaged.")
