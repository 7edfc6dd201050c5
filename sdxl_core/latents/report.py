"""Looking at a latent cache: the bucket histogram, and pictures beside their latents in false colour."""

from __future__ import annotations

import glob
import io
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw

from sdxl_core.config import CacheLatentsConfig
from sdxl_core.errors import SdxlFlowsError
from sdxl_core.images.decode import BadPicture, decode
from sdxl_core.latents.formats import read_per_image
from sdxl_core.latents.ledger import LEDGER_FOLDER, LatentRow, ShardLedger
from sdxl_core.refs import LatentSetRef

BAR_WIDTH = 40
CELL_PX, GAP_PX, LABEL_PX, COLUMNS = 176, 8, 10, 2
CELL_WIDTH_PX = 2 * CELL_PX + 3 * GAP_PX
# Four channels to red, green, blue: a fixed linear map, so that equal latents look equal on every sheet.
FALSE_COLOUR = np.array([[0.6, 0.0, 0.2], [0.0, 0.6, 0.2], [0.0, 0.2, 0.6], [0.3, -0.3, 0.0]], dtype=np.float32)


def bucket_histogram_text(ref: LatentSetRef) -> str:
    """A line a bucket with its count and a bar, and the mean aspect-ratio error."""
    most = max(ref.buckets.values(), default=1)
    lines = [
        f"bucket {number:>2}  {name:>9}  {count:>7}  {'█' * max(1, round(BAR_WIDTH * count / most))}"
        for number, (name, count) in enumerate(ref.buckets.items())
    ]
    return "\n".join([*lines, f"mean aspect-ratio error {ref.mean_ar_error:.4f} over {ref.num_kept} pictures"])


def contact_sheet(config: CacheLatentsConfig, *, num_pictures: int) -> bytes:
    """A PNG: pictures of every bucket in turn, each beside its latents in false colour."""
    cells = [cell for row in _spread(config.out / "latents", num_pictures) if (cell := _cell(config, row)) is not None]
    rows = [cells[start : start + COLUMNS] for start in range(0, len(cells), COLUMNS)]
    heights = [max(cell.height for cell in row) for row in rows]
    sheet = Image.new("RGB", (COLUMNS * CELL_WIDTH_PX, max(1, sum(heights))), "#ffffff")
    for number, row in enumerate(rows):
        for column, cell in enumerate(row):
            sheet.paste(cell, (column * CELL_WIDTH_PX, sum(heights[:number])))
    buffer = io.BytesIO()
    sheet.save(buffer, "PNG")
    return buffer.getvalue()


def false_colour(latents: NDArray[np.float32]) -> Image.Image:
    """float32 [4, h, w] as an RGB picture [h, w]: two standard deviations each way fill the range."""
    centred = latents - latents.mean(axis=(1, 2), keepdims=True)
    scaled = centred / (2 * centred.std() + 1e-6)
    rgb = np.einsum("chw,cr->hwr", scaled, FALSE_COLOUR) * 127.5 + 127.5
    return Image.fromarray(rgb.clip(0, 255).astype(np.uint8))


def _spread(latents: Path, num_pictures: int) -> list[LatentRow]:
    """Rows from every bucket in turn, the same ones each time."""
    by_bucket: dict[tuple[int, int], list[LatentRow]] = {}
    for path in sorted((latents / LEDGER_FOLDER).glob("*.ledger.jsonl")):
        for row in ShardLedger.read(path).rows():
            by_bucket.setdefault(row.bucket, []).append(row)
    queues = [sorted(rows, key=lambda row: row.key) for _, rows in sorted(by_bucket.items())]
    longest = max(map(len, queues), default=0)
    return [queue[depth] for depth in range(longest) for queue in queues if depth < len(queue)][:num_pictures]


def _cell(config: CacheLatentsConfig, row: LatentRow) -> Image.Image | None:
    """One picture, its latents and its key; None where either is gone."""
    picture = _picture(config, row)
    try:
        latents = false_colour(read_per_image(config.out / "latents" / row.file).latents)
    except SdxlFlowsError:
        return None
    if picture is None:
        return None
    scaled = [_fit(image) for image in (picture, latents)]
    height = max(image.height for image in scaled)
    cell = Image.new("RGB", (CELL_WIDTH_PX, height + 3 * GAP_PX + LABEL_PX), "#ffffff")
    for column, image in enumerate(scaled):
        cell.paste(image, (GAP_PX + column * (CELL_PX + GAP_PX), GAP_PX))
    name = row.key if len(row.key) <= 40 else "..." + row.key[-37:]
    label = f"{name}  {row.bucket[0]}x{row.bucket[1]}"
    ImageDraw.Draw(cell).text((GAP_PX, height + GAP_PX + 4), label.encode("ascii", "replace").decode(), fill="#33404a")
    return cell


def _fit(image: Image.Image) -> Image.Image:
    """Scaled so that its longer side fills a cell, without smoothing."""
    scale = CELL_PX / max(image.size)
    size = (max(1, round(image.width * scale)), max(1, round(image.height * scale)))
    return image.resize(size, Image.Resampling.NEAREST)


def _picture(config: CacheLatentsConfig, row: LatentRow) -> Image.Image | None:
    stem = config.source / row.file.removesuffix(".npz")
    for path in sorted(stem.parent.glob(f"{glob.escape(stem.name)}.*")):
        if path.suffix.lower() not in (".npz", ".txt", ".caption"):
            try:
                image = Image.fromarray(decode(path.read_bytes(), compat=config.compat, background=config.background))
            except (BadPicture, OSError):
                continue
            image.thumbnail((CELL_PX, CELL_PX))
            return image
    return None
