"""Sizes that no source tells, read from the pictures' headers and kept beside their part.

A part's rows never change, so sizes stand in a file of their own, a row each, which is written again as more are read:
what was built before and what is built after, a catalog with and one without sizes, share all else.
A size is that of the upright picture (EXIF orientation applied), as latents are made of it by default.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa

from sdxl_core.catalog.config import CatalogSource
from sdxl_core.catalog.images import ImageReader, place_of
from sdxl_core.catalog.mapped import write_arrow
from sdxl_core.catalog.parts import Part, sizes_path
from sdxl_core.catalog.records import CHUNK_RECORDS, Catalog
from sdxl_core.catalog.schema import IMAGE_COLUMNS, NOT_READ, SIZES, UNREADABLE
from sdxl_core.dataset import forked
from sdxl_core.errors import ConfigError, DataError
from sdxl_core.progress import Progress, no_progress

Ints = np.ndarray[Any, np.dtype[Any]]
STAGE = "sizes"
BLOCK = 4_096  # pictures read between two writings
MOST = 2**31 - 1


class _Block(NamedTuple):
    """Rows of a part whose pictures are read, ascending."""

    part: Part
    source: CatalogSource
    rows: Ints


def read_sizes(catalog: Catalog, records: Ints | None = None, *, progress: Progress = no_progress) -> Catalog:
    """The catalog with the sizes of its pictures, as far as it reads sizes and their headers tell.

    What is known, from a source or an earlier reading, is not read. A picture that cannot be opened is tried again the
    next time; one whose header is damaged is not.
    Args:   records: only of these; None: of all.
    Returns: the catalog opened anew, the one given where nothing was to be read.
    Raises: ConfigError: there is something to read and the catalog cannot be written.   DiskFullError.
    """
    unread = [] if catalog.sizes == "skip" else _unread_records(catalog, records)
    if not unread:
        return catalog
    if not can_keep_sizes(catalog):
        raise ConfigError(
            f"{catalog.path}: sizes of {sum(len(block.rows) for block in unread):,} of its pictures are not known, "
            f"and this folder cannot be written to keep what their headers tell. Make it writable, or let its owner "
            f"build the catalog with `--sizes read`, or with `--sizes skip`: they are then in no range of sizes."
        )
    _read(unread, forked.num_processes(len(os.sched_getaffinity(0))), progress)
    return Catalog.open(catalog.path)


def can_keep_sizes(catalog: Catalog) -> bool:
    """Whether sizes that are read can be written into the catalog."""
    return os.access(catalog.path / "parts", os.W_OK)


def read_part_sizes(part: Part, source: CatalogSource) -> None:
    """Read the sizes of all pictures of a part that have not been read yet. Raises: DiskFullError."""
    _read([_Block(part, source, _unread(part))], 1, no_progress)


def has_all_sizes(part: Part, source: CatalogSource) -> bool:
    """Whether every picture of a part has been read, as far as its source has pictures whose sizes are wanted."""
    return not has_headers(source) or not len(_unread(part))


def has_headers(source: CatalogSource) -> bool:
    """Whether sizes may be read from a source's pictures."""
    return source.kind in ("folder", "tars") and {"images", "facts"} <= set(source.use)


def has_unread_sizes(catalog: Catalog) -> bool:
    """Whether there are pictures of unknown size whose headers were not read."""
    return bool(_unread_records(catalog, None))


def num_sized(catalog: Catalog) -> int:
    """How many records' sizes are known, from whatever source."""
    num_known = 0
    for chunk in catalog.chunks(["width", "height"]):
        width, height = (np.asarray(chunk.table[name].is_valid()) for name in ("width", "height"))
        num_known += int(np.count_nonzero(width & height))
    return num_known


def _unread_records(catalog: Catalog, records: Ints | None) -> list[_Block]:
    """A block a part: the rows of pictures of unknown size whose headers were not read.

    A byte a row is held meanwhile.
    """
    readable = [has_headers(catalog.sources[source]) for source in catalog.part_sources]
    if not any(readable):
        return []
    starts = catalog.part_starts
    is_lacking = np.zeros(int(starts[-1]), bool)
    num_records = catalog.num_records if records is None else len(records)
    for start in range(0, num_records, CHUNK_RECORDS):
        stop = min(start + CHUNK_RECORDS, num_records)
        some = np.arange(start, stop) if records is None else records[start:stop]
        rows = catalog.rows_without_size(some)
        is_lacking[rows[rows >= 0]] = True
        catalog.forget()
    unread = []
    for number in np.flatnonzero(readable).tolist():
        part, lacking = catalog.parts[number], is_lacking[starts[number] : starts[number + 1]]
        rows = _unread(part) if lacking.any() else np.zeros(0, np.int64)
        rows = rows[lacking[rows]]
        if len(rows):
            unread.append(_Block(part, catalog.sources[catalog.part_sources[number]], rows))
    return unread


def _unread(part: Part) -> Ints:
    """The rows of a part that have a picture whose header was not read, ascending."""
    has_picture = np.asarray(part.rows["image"].is_valid())
    sizes = part.sizes
    return np.flatnonzero(has_picture if sizes is None else has_picture & (sizes["width"].to_numpy() == NOT_READ))


def _read(unread: Sequence[_Block], count: int, progress: Progress) -> None:
    """Read pictures, BLOCK at a time, in `count` processes, and keep what each block tells as soon as it is read."""
    blocks = [
        block._replace(rows=block.rows[start : start + BLOCK])
        for block in unread
        for start in range(0, len(block.rows), BLOCK)
    ]
    if not blocks:
        return
    import sdxl_core.images.decode  # noqa: F401 once, not in every forked process

    done, total = 0, sum(len(block.rows) for block in blocks)
    part, sizes = None, np.zeros((2, 0), np.int32)
    found = forked.map_forked(_headers, blocks, count=min(count, len(blocks)))
    for block, read in zip(blocks, found, strict=True):
        if part is not block.part:
            part, sizes = block.part, _kept(block.part)
        sizes[:, block.rows] = read
        columns = [pa.array(side) for side in sizes]
        write_arrow(sizes_path(part.path), pa.RecordBatch.from_arrays(columns, schema=SIZES))
        part.forget()
        done += len(block.rows)
        progress(STAGE, done, total)


def _kept(part: Part) -> Ints:
    """What has been read of a part, int32 [2, num_rows]: widths and heights."""
    kept = part.sizes
    if kept is None:
        return np.full((2, part.rows.num_rows), NOT_READ, np.int32)
    return np.stack([kept["width"].to_numpy(), kept["height"].to_numpy()])


def _headers(block: _Block) -> Ints:
    """Widths and heights that the headers of a block's pictures tell, int32 [2, num_rows]."""
    from sdxl_core.images.decode import BadPicture, read_header_of

    rows = block.part.rows.select(IMAGE_COLUMNS).take(pa.array(block.rows)).to_pylist()
    found = np.full((2, len(rows)), NOT_READ, np.int32)
    with ImageReader() as reader:
        for number, row in enumerate(rows):
            try:
                with reader.opened(place_of(row, block.source.path)) as file:
                    size = read_header_of(file, compat="default").size(honour_exif=True)
                is_known = 0 < size.width_px <= MOST and 0 < size.height_px <= MOST
                found[:, number] = (size.width_px, size.height_px) if is_known else UNREADABLE
            except DataError:  # not to be read now: tried again
                continue
            except BadPicture as error:
                is_of_disk = isinstance(error.__cause__, OSError) and error.__cause__.errno is not None
                found[:, number] = NOT_READ if is_of_disk else UNREADABLE
    return found
