"""Writing a commit group of latents that exist already, in either layout, as the encoder names its files."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from sdxl_core.config import ConvertLatentsConfig
from sdxl_core.files import sync_files
from sdxl_core.latents.formats import (
    LatentRecord,
    WrittenFile,
    packed_name,
    per_image_name,
    write_packed,
    write_per_image,
)
from sdxl_core.latents.formats.packed import PackedDtype
from sdxl_core.latents.ledger import CommitGroup, LatentFile, Rejection


class Item(NamedTuple):
    """A picture's latents. `row`: in its shard.   name: of its file, without ending."""

    row: int
    key: str
    name: str
    record: LatentRecord


@dataclass(frozen=True, slots=True)
class GroupWriter:
    """Writes groups of one shard. `digest`: the shard's.   dtype: of packed latents."""

    latents: Path
    digest: str
    config: ConvertLatentsConfig
    dtype: PackedDtype

    def write(
        self, number: int, items: Sequence[Item], rejected: dict[int, Rejection], *, taken: Collection[str]
    ) -> CommitGroup:
        """Write and sync a group's files.

        Args:   taken: packed files that hold committed rows; none of them is written again.
        Raises: DiskFullError.   DataError: values too large for float16.
        """
        by_file = self._packed(number, items, taken) if self.config.layout == "packed" else self._per_image(items)
        files: list[LatentFile] = []
        place: dict[int, tuple[int, int, int]] = {}
        for path, members, written in by_file:
            for at, (item, checksum) in enumerate(zip(members, written.row_crc32s, strict=True)):
                place[item.row] = len(files), at if self.config.layout == "packed" else -1, checksum
            mtime_ns = (self.latents / path).stat().st_mtime_ns
            files.append(LatentFile(path, written.num_bytes, mtime_ns, written.crc32))
        sync_files([self.latents / file.path for file in files])
        return CommitGroup(
            number=number,
            files=files,
            rows=[item.row for item in items],
            file=[place[item.row][0] for item in items],
            at=[place[item.row][1] for item in items],
            crc32=[place[item.row][2] for item in items],
            bucket=[item.record.bucket for item in items],
            size=[(item.record.original_width_px, item.record.original_height_px) for item in items],
            crop=[item.record.crop_ltrb for item in items],
            rejected=rejected,
        )

    def _per_image(self, items: Sequence[Item]) -> list[tuple[str, list[Item], WrittenFile]]:
        files = []
        for item in items:
            width_px, height_px = item.record.original_width_px, item.record.original_height_px
            path = per_image_name(item.name, self.config.npz_naming, width_px=width_px, height_px=height_px)
            files.append((path, [item], write_per_image(self.latents / path, item.record)))
        return files

    def _packed(
        self, number: int, items: Sequence[Item], taken: Collection[str]
    ) -> list[tuple[str, list[Item], WrittenFile]]:
        """One file a bucket; where some of its pictures have other arrays (a mask, say), one for each kind."""
        alike: dict[tuple[tuple[int, int], tuple[str, ...]], list[Item]] = {}
        for item in items:
            names = tuple(name for name, _ in item.record.arrays())
            alike.setdefault((item.record.bucket, names), []).append(item)
        files: list[tuple[str, list[Item], WrittenFile]] = []
        used = set(taken)
        for ((width_px, height_px), _), members in sorted(alike.items()):
            path = packed_name(self.digest, number, width_px=width_px, height_px=height_px, taken=used)
            used.add(path)
            keys, records = [item.key for item in members], [item.record for item in members]
            files.append((path, members, write_packed(self.latents / path, keys, records, self.dtype)))
        return files
