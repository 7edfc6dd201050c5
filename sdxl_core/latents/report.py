"""Looking at a latent cache: the bucket histogram, and pictures beside their latents in false colour."""

from __future__ import annotations

import io
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray
from PIL import Image, ImageDraw

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
CELL_PX, GAP_PX, LABEL_PX, COLUMNS = 176, 8, 10, 2
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
    """A PNG: pictures of every bucket in turn, each beside its latents in false colour; where the VAE is a trained one,
    also beside what it makes of the middle of the latents."""
    store = LatentStore(config.out / "latents")
    shown = _spread(config, num_pictures)
    decode_middle = None if config.vae == "tiny" or not shown else middle_decoder(config.vae)
    cells = [cell for picture in shown if (cell := _cell(config, store, picture, decode_middle)) is not None]
    rows = [cells[start : start + COLUMNS] for start in range(0, len(cells), COLUMNS)]
    heights = [max(cell.height for cell in row) for row in rows]
    width = max((cell.width for cell in cells), default=CELL_PX)
    sheet = Image.new("RGB", (COLUMNS * width, max(1, sum(heights))), "#ffffff")
    for number, row in enumerate(rows):
        for column, cell in enumerate(row):
            sheet.paste(cell, (column * width, sum(heights[:number])))
    buffer = io.BytesIO()
    sheet.save(buffer, "PNG")
    return buffer.getvalue()


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
    """(hours since the first commit, pictures a second around then), of all devices together."""
    commits = sorted(commit for summary in _summaries(latents) for commit in summary.commits)
    if len(commits) < 2 or commits[-1][0] <= commits[0][0]:
        return []
    times, counts = np.array(commits).T
    edges = np.linspace(times[0], times[-1], min(num_points, len(commits)) + 1)
    sums, _ = np.histogram(times[1:], edges, weights=counts[1:])  # the first commit's pictures came before it
    middles = (edges[1:] + edges[:-1]) / 2 - times[0]
    return list(zip((middles / 3600).tolist(), (sums / np.diff(edges)).tolist(), strict=True))


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
    picture.thumbnail((CELL_PX, CELL_PX))
    scaled = [_fit(image) for image in (picture, false_colour(latents))]
    if decode_middle is not None:
        scaled.append(_fit(decode_middle(latents)))
    height = max(image.height for image in scaled)
    cell = Image.new("RGB", (GAP_PX + len(scaled) * (CELL_PX + GAP_PX), height + 3 * GAP_PX + LABEL_PX), "#ffffff")
    for column, image in enumerate(scaled):
        cell.paste(image, (GAP_PX + column * (CELL_PX + GAP_PX), GAP_PX))
    name = shown.key if len(shown.key) <= 40 else "..." + shown.key[-37:]
    label = f"{name}  {shown.bucket[0]}x{shown.bucket[1]}"
    ImageDraw.Draw(cell).text((GAP_PX, height + GAP_PX + 4), label.encode("ascii", "replace").decode(), fill="#33404a")
    return cell


def _fit(image: Image.Image) -> Image.Image:
    """Scaled so that its longer side fills a cell, without smoothing."""
    scale = CELL_PX / max(image.size)
    size = (max(1, round(image.width * scale)), max(1, round(image.height * scale)))
    return image.resize(size, Image.Resampling.NEAREST)
