"""Small collections of pictures, and what a latent set of them holds."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from support.pictures import encoded, picture

from sdxl_core.latents import LatentStore
from sdxl_core.latents.ledger import KEPT, ShardLedger
from sdxl_core.latents.rows import ENDING, LEDGER_FOLDER, ShardRows

SIZES = [(64, 64), (90, 60), (60, 90), (128, 40), (50, 70)]
KINDS = [("png", "PNG"), ("jpg", "JPEG"), ("webp", "WEBP")]


def collection(num_pictures: int = 12, *, first: int = 0) -> dict[str, bytes]:
    """Files by name: five sizes, three formats, some in a sub-folder."""
    files = {}
    for number in range(first, first + num_pictures):
        width_px, height_px = SIZES[number % len(SIZES)]
        suffix, kind = KINDS[number % len(KINDS)]
        image = picture(width_px, height_px, seed=number)
        files[f"{'deep/' if number % 4 == 3 else ''}{number:03}.{suffix}"] = encoded(image, kind)
    return files


def snapshot(out: Path) -> dict[str, bytes]:
    """Every finished file of a latent set, ledgers aside (they tell times and speeds)."""
    files = [*out.glob("latents/**/*.npz"), out / "meta_lat.json", out / "rejected.jsonl"]
    return {str(path.relative_to(out)): path.read_bytes() for path in sorted(files) if path.exists()}


def contents(out: Path) -> dict[str, tuple[Any, ...]]:
    """What a reader gets of each picture, whatever files it is in."""
    store = LatentStore(out / "latents")
    found = {}
    for key in store.keys:
        record = store.read(key)
        arrays = tuple((name, array.dtype.str, array.tobytes()) for name, array in record.arrays())
        found[key] = (arrays, record.original_width_px, record.original_height_px, record.crop_ltrb)
    return found


def committed(out: Path) -> int:
    """How many rows ledgers hold as kept."""
    shards = [ShardRows.open(path) for path in (out / "latents" / LEDGER_FOLDER).glob(f"*{ENDING}")]
    return sum(len(ShardLedger.read(shard.path, shard.num_rows).rows(KEPT)) for shard in shards)
