"""Looking at a latent cache: the bucket histogram, and pictures beside their latents in false colour."""

from __future__ import annotations

import io
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

from sdxl_core.catalog.images import ImagePlace, ImageReader
from sdxl_core.config import CacheLatentsConfig
from sdxl_core.errors import SdxlFlowsError
from sdxl_core.images.decode import BadPicture, decode
from sdxl_core.latents.index import LatentIndex
from sdxl_core.latents.ledger import Summary, read_summary
from sdxl_core.latents.matching import NameTable
from sdxl_core.latents.rows import ENDING, LEDGER_FOLDER, ShardRows
from sdxl_core.latents.store import LatentStore
from sdxl_core.refs import LatentSetRef

MiddleDecoder = Callable[[NDArray[np.float32]], Image.Image]
BAR_WIDTH = 40
SHEET_PX, CELL_PX, GAP_PX, LABEL_PX, HEADING_PX, CHARACTER_PX = 820, 120, 8, 18, 34, 7
MIDDLE = 32  # latents a side that are decoded: 256 px, quick on a CPU too
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
    """A PNG: bucket by bucket some pictures, each beside its latents in false colour; where the VAE is a trained one,
    also beside what it makes of the middle of the latents."""
    store = LatentStore(config.out / "latents")
    shown = _spread(config, num_pictures)
    decode_middle = None if config.vae == "tiny" or not shown else middle_decoder(config.vae)
    by_bucket: dict[tuple[int, int], list[Image.Image]] = {}
    for picture in shown:
        cell = _cell(config, store, picture, decode_middle)
        if cell is not None:
            by_bucket.setdefault(picture.bucket, []).append(cell)
    buffer = io.BytesIO()
    _sheet(by_bucket).save(buffer, "PNG")
    return buffer.getvalue()


def _sheet(by_bucket: Mapping[tuple[int, int], Sequence[Image.Image]]) -> Image.Image:
    """The cells of each bucket below its name, bucket after bucket."""
    blocks = []
    for (width_px, height_px), cells in sorted(by_bucket.items()):
        block = _flowed(cells, top=HEADING_PX)
        draw, below = ImageDraw.Draw(block), HEADING_PX - 3
        draw.line((GAP_PX, below, block.width - 2 * GAP_PX, below), fill="#d5dde3")
        draw.text((GAP_PX, 8), f"{width_px} x {height_px}", fill="#22303a", font=ImageFont.load_default(15))
        blocks.append(block)
    return _flowed(blocks)


def _flowed(images: Sequence[Image.Image], *, top: int = 0) -> Image.Image:
    """Images from left to right, in as many rows as it takes. Args: top: pixels that are left free above."""
    placed: list[tuple[Image.Image, int, int]] = []
    left = right = below = 0
    for image in images:
        if left and left + image.width > SHEET_PX:
            top, left, below = top + below, 0, 0
        placed.append((image, left, top))
        left, below = left + image.width, max(below, image.height)
        right = max(right, left)
    sheet = Image.new("RGB", (max(right, CELL_PX), max(top + below, 1)), "#ffffff")
    for image, left, above in placed:
        sheet.paste(image, (left, above))
    return sheet


def channel_statistics(latents: Path, *, num_pictures: int = 256) -> list[tuple[float, float]]:
    """Mean and standard deviation of each channel, over pictures spread evenly over the set."""
    store, index = LatentStore(latents), LatentIndex.open(latents)
    rows = np.unique(np.linspace(0, index.num_rows - 1, min(num_pictures, index.num_rows)).astype(np.int64))
    sums, squares, count = np.zeros(4), np.zeros(4), 0
    for key in index.take(rows, ["key"])["key"].to_pylist():
        try:
            values = store.read(key).latents.astype(np.float64).reshape(4, -1)
        except SdxlFlowsError:
            continue
        sums, squares, count = sums + values.sum(axis=1), squares + (values**2).sum(axis=1), count + values.shape[1]
    means = sums / max(count, 1)
    deviations = np.sqrt(np.maximum(squares / max(count, 1) - means**2, 0))
    return list(zip(means.tolist(), deviations.tolist(), strict=True))


def speed_over_time(latents: Path, *, num_points: int = 60) -> list[tuple[float, float]]:
    """(seconds since the first commit, pictures a second around then), of all devices together."""
    commits = [commit for summary in _summaries(latents) for commit in summary.commits]
    if not commits:
        return []
    times, which = np.unique([time for time, _ in commits], return_inverse=True)
    done = np.cumsum(np.bincount(which, weights=[count for _, count in commits]))
    edges = np.unique(np.linspace(0, len(times) - 1, min(num_points + 1, len(times))).astype(np.int64))
    times, done = times[edges], done[edges]  # from commit to commit: the first one's pictures came before it
    middles = (times[1:] + times[:-1]) / 2 - times[0]
    return list(zip(middles.tolist(), (np.diff(done) / np.diff(times)).tolist(), strict=True))


def shard_limits(latents: Path) -> tuple[Counter[str], Counter[str]]:
    """How many shards were bound by which stage; the seconds of every stage, summed over shards (stages overlap)."""
    bound, seconds = Counter[str](), Counter[str]()
    for summary in _summaries(latents):
        bound[str(summary.report.get("bound_by", "unknown"))] += 1
        seconds.update(summary.report.get("seconds", {}))
    return bound, seconds


def _summaries(latents: Path) -> Iterator[Summary]:
    paths = sorted((latents / LEDGER_FOLDER).glob(f"*{ENDING}"))
    return (summary for path in paths if (summary := read_summary(path)) is not None)


def false_colour(latents: NDArray[np.float32]) -> Image.Image:
    """float32 [4, h, w] as an RGB picture [h, w]: two standard deviations each way fill the range."""
    centred = latents - latents.mean(axis=(1, 2), keepdims=True)
    scaled = centred / (2 * centred.std() + 1e-6)
    rgb = np.einsum("chw,cr->hwr", scaled, FALSE_COLOUR) * 127.5 + 127.5
    return Image.fromarray(rgb.clip(0, 255).astype(np.uint8))


def middle_decoder(vae: str) -> MiddleDecoder:
    """A function that decodes the middle of latents, float32 [4, h, w], unscaled, in float32 on the CPU.

    Raises: ConfigError, CheckpointError: `vae` cannot be loaded.
    """
    import torch

    from sdxl_core.models.load import load_vae

    module = load_vae(vae, dtype=torch.float32)

    def decode_middle(latents: NDArray[np.float32]) -> Image.Image:
        top, left = (max(0, (side - MIDDLE) // 2) for side in latents.shape[1:])
        middle = torch.from_numpy(latents[None, :, top : top + MIDDLE, left : left + MIDDLE].copy())
        with torch.inference_mode():
            pixels = module.decode(middle).sample[0].permute(1, 2, 0)
        return Image.fromarray(pixels.mul(127.5).add(127.5).round().clamp(0, 255).byte().numpy())

    return decode_middle


class _Shown(NamedTuple):
    """A picture to show: its key, its bucket in pixels, and where it is."""

    key: str
    bucket: tuple[int, int]
    place: ImagePlace


def _spread(config: CacheLatentsConfig, num_pictures: int) -> list[_Shown]:
    """Pictures from every bucket in turn, the same ones each time."""
    index = LatentIndex.open(config.out / "latents")
    by_bucket: dict[tuple[int, int], list[int]] = {}
    start = 0
    for chunk in index.chunks(["bucket_width_px", "bucket_height_px"]):
        sizes = np.stack([column.to_numpy() for column in chunk.columns], axis=1)
        for width_px, height_px in np.unique(sizes, axis=0).tolist():
            rows = np.flatnonzero((sizes == (width_px, height_px)).all(axis=1))[:num_pictures] + start
            by_bucket.setdefault((width_px, height_px), []).extend(rows.tolist())
        start += chunk.num_rows
    queues = [(bucket, rows[:num_pictures]) for bucket, rows in sorted(by_bucket.items())]
    longest = max((len(rows) for _, rows in queues), default=0)
    turns = [(rows[depth], bucket) for depth in range(longest) for bucket, rows in queues if depth < len(rows)]
    keys = index.take([row for row, _ in turns[:num_pictures]], ["key"])["key"].to_pylist()
    places = _places(config, keys)
    return [_Shown(key, bucket, places[key]) for key, (_, bucket) in zip(keys, turns, strict=False) if key in places]


def _places(config: CacheLatentsConfig, keys: list[str]) -> dict[str, ImagePlace]:
    """Where the pictures of keys are, as the shards' listings have it."""
    wanted = NameTable(pa.array(keys, pa.large_string()))
    found: dict[str, ImagePlace] = {}
    for path in sorted((config.out / "latents" / LEDGER_FOLDER).glob(f"*{ENDING}")):
        if len(found) == len(keys):
            break
        rows = ShardRows.open(path)
        positions = wanted.find(rows.table["key"])
        mine = np.flatnonzero(positions >= 0)
        places = rows.places(mine, config.source)
        found |= {keys[position]: place for position, place in zip(positions[mine].tolist(), places, strict=True)}
    return found


def _cell(
    config: CacheLatentsConfig, store: LatentStore, shown: _Shown, decode_middle: MiddleDecoder | None
) -> Image.Image | None:
    """One picture, its latents and its key; None where either is gone."""
    try:
        latents = store.read(shown.key).latents.astype(np.float32)
        with ImageReader() as reader:
            data = reader.read(shown.place)
        picture = Image.fromarray(decode(data, compat=config.compat, background=config.background))
    except (SdxlFlowsError, BadPicture):
        return None
    scaled = [_fit(picture, Image.Resampling.LANCZOS), _fit(false_colour(latents))]
    if decode_middle is not None:
        scaled.append(_fit(decode_middle(latents)))
    width = max(CELL_PX, sum(image.width for image in scaled) + GAP_PX * len(scaled))
    height = max(image.height for image in scaled)
    cell = Image.new("RGB", (width + 2 * GAP_PX, height + 2 * GAP_PX + LABEL_PX), "#ffffff")
    left = GAP_PX
    for image in scaled:
        cell.paste(image, (left, GAP_PX))
        left += image.width + GAP_PX // 2
    most = width // CHARACTER_PX
    name = shown.key if len(shown.key) <= most else "..." + shown.key[3 - most :]
    label, font = name.encode("ascii", "replace").decode(), ImageFont.load_default(11)
    ImageDraw.Draw(cell).text((GAP_PX, height + GAP_PX + 2), label, fill="#5a6872", font=font)
    return cell


def _fit(image: Image.Image, how: Image.Resampling = Image.Resampling.NEAREST) -> Image.Image:
    """Scaled so that its longer side is CELL_PX."""
    scale = CELL_PX / max(image.size)
    size = (max(1, round(image.width * scale)), max(1, round(image.height * scale)))
    return image.resize(size, how)
