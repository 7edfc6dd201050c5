"""Arrow files of one record batch: written whole or not at all, read by memory mapping."""

from __future__ import annotations

import ctypes
import mmap
import sys
from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa

from sdxl_core.errors import DataError
from sdxl_core.files import atomic_writer

_MADVISE = ctypes.CDLL(None).madvise if sys.platform == "linux" else None


@dataclass(frozen=True, slots=True)
class Mapped:
    """A mapped file. It holds no file handle, so any number may be open. `whole`: all of its bytes."""

    batch: pa.RecordBatch
    whole: pa.Buffer

    def forget(self) -> None:
        """Give back the pages that were read, so that a pass over many files holds a few of them only.

        Arrays that look into the file stay valid: what they need again comes from the page cache.
        """
        if _MADVISE is not None:
            _MADVISE(ctypes.c_void_p(self.whole.address), ctypes.c_size_t(self.whole.size), mmap.MADV_DONTNEED)


def map_arrow(path: Path) -> Mapped:
    """Memory-map an Arrow IPC file of one record batch. Raises: DataError: it is not there, or not whole."""
    try:
        with pa.memory_map(str(path)) as file:
            whole = file.read_buffer()  # stays mapped when the file is closed
        return Mapped(pa.ipc.open_file(pa.BufferReader(whole)).get_batch(0), whole)
    except (OSError, pa.ArrowInvalid) as error:
        raise DataError(
            f"{path}: this part of the catalog is missing or damaged ({error}). Build the catalog again: "
            f"`sdxl-flows catalog` with the same arguments redoes what is missing."
        ) from error


def open_arrow(path: Path) -> pa.RecordBatch:
    """The batch of `map_arrow`. Raises: as there."""
    return map_arrow(path).batch


def write_arrow(path: Path, batch: pa.RecordBatch) -> None:
    """Write an Arrow IPC file of one record batch, whole or not at all."""
    with atomic_writer(path) as file, pa.ipc.new_file(file, batch.schema) as writer:
        writer.write_batch(batch)
