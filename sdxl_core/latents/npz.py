"""One picture's latents on disk: the `.npz` that sd-scripts writes and reads, byte for byte what np.savez gives."""

from __future__ import annotations

import io
import zipfile
import zlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from sdxl_core.errors import ShardError
from sdxl_core.files import write_atomic

REPAIR = "Delete it and run cache-latents again: only what is missing is encoded."


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class LatentRecord:
    """A picture's latents and sizes.

    latents: float32 [4, height / 8, width / 8], a sample of the posterior, not scaled by the VAE's factor.
    original_width_px, original_height_px: of the source picture.   crop_ltrb: see buckets.crop_ltrb.
    """

    latents: NDArray[np.float32]
    original_width_px: int
    original_height_px: int
    crop_ltrb: tuple[float, float, float, float]

    def crc32(self) -> int:
        """Checksum of the latents' bytes."""
        return zlib.crc32(np.ascontiguousarray(self.latents).tobytes())


def write_npz(path: Path, record: LatentRecord, *, sync: bool = True) -> None:
    """Write atomically. Raises: DiskFullError, DataError (no permission)."""
    buffer = io.BytesIO()
    np.savez(
        buffer,
        latents=np.ascontiguousarray(record.latents, dtype=np.float32),
        original_size=np.array([record.original_width_px, record.original_height_px]),
        crop_ltrb=np.array(record.crop_ltrb, dtype=np.float64),
    )
    write_atomic(path, buffer.getvalue(), sync=sync)


def read_npz(path: Path) -> LatentRecord:
    """Read and check a file of ours or of sd-scripts; never unpickles.

    Raises: ShardError: missing, torn, a checksum that does not fit, or not a latent file.
    """
    try:
        with open(path, "rb") as file, np.lib.npyio.NpzFile(file, own_fid=False, allow_pickle=False) as arrays:
            latents, size, crop = arrays["latents"], arrays["original_size"], arrays["crop_ltrb"]
    except FileNotFoundError as error:
        raise ShardError(f"{path}: the latents are gone. {REPAIR}") from error
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile, zlib.error) as error:
        raise ShardError(f"{path}: not a whole latent file ({error}). {REPAIR}") from error
    if latents.ndim != 3 or latents.shape[0] != 4 or size.shape != (2,) or crop.shape != (4,):
        raise ShardError(f"{path}: its arrays are not SDXL latents (latents are {latents.shape}). Delete it and rerun.")
    return LatentRecord(
        latents=np.ascontiguousarray(latents, dtype=np.float32),
        original_width_px=int(size[0]),
        original_height_px=int(size[1]),
        crop_ltrb=(float(crop[0]), float(crop[1]), float(crop[2]), float(crop[3])),
    )
