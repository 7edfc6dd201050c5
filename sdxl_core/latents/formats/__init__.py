"""The two layouts of latents on disk: one `.npz` a picture, as sd-scripts has them, and packed files of many pictures.

Pure functions of paths and arrays; ledgers, indexes and settings are their callers' business.
"""

from sdxl_core.latents.formats.checksum import crc32
from sdxl_core.latents.formats.packed import PackedFile, packed_name, write_packed
from sdxl_core.latents.formats.per_image import (
    Naming,
    inspect_per_image,
    per_image_name,
    read_per_image,
    write_per_image,
)
from sdxl_core.latents.formats.record import LatentRecord, WrittenFile

__all__ = [
    "LatentRecord",
    "Naming",
    "PackedFile",
    "WrittenFile",
    "crc32",
    "inspect_per_image",
    "packed_name",
    "per_image_name",
    "read_per_image",
    "write_packed",
    "write_per_image",
]
