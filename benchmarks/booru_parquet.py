"""A synthetic booru dump: danbooru's columns, shuffled ids, tags drawn by Zipf's law from a large vocabulary.

python benchmarks/booru_parquet.py OUT.parquet --rows 1000000
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

ROW_GROUP = 50_000
# category: tags in the vocabulary, tags a row (mean of a Poisson distribution, at least `least`)
CATEGORIES = {
    "artist": (40_000, 1.0, 1),
    "character": (30_000, 1.4, 0),
    "copyright": (10_000, 1.2, 1),
    "general": (40_000, 26.0, 8),
    "meta": (400, 2.6, 0),
}
SYLLABLES = "ka shi no mi to ra hana blue red long hair eyes smile hat of the sky sea star moon kitsune é 花 ō".split()  # noqa: SIM905


def vocabulary(rng: np.random.Generator, category: str, size: int) -> pa.Array:
    """Distinct tags, one in 50 with letters outside ASCII, one in 9 with a bracket; a few that people query."""
    known = {"general": ["1girl", "solo", "long_hair", "pink_hair", "blonde_hair", "cat_ears", "fox_ears", "comic"]}
    known |= {"character": ["astolfo_(fate)", "hatsune_miku"], "copyright": ["fate_(series)"]}
    tags = dict.fromkeys(known.get(category, []))
    ascii_only = [syllable for syllable in SYLLABLES if syllable.isascii()]
    while len(tags) < size:
        words = rng.choice(SYLLABLES if rng.random() < 0.02 else ascii_only, rng.integers(1, 4)).tolist()
        name = "_".join([*words, str(len(tags))])
        tags[f"{name}_({words[0]})" if rng.random() < 0.11 else name] = None
    return pa.array(list(tags), pa.string())


def tag_strings(rng: np.random.Generator, tags: pa.Array, lengths: np.ndarray[Any, Any]) -> pa.Array:
    """One text a row: tags of Zipf frequency (exponent 1), separated by a blank, none twice."""
    row = np.repeat(np.arange(len(lengths)), lengths)
    ids = np.minimum(np.exp(rng.random(len(row)) * np.log(len(tags) + 1)).astype(np.int64) - 1, len(tags) - 1)
    pairs = np.unique(row * len(tags) + ids)
    rng.shuffle(pairs)
    pairs = pairs[np.argsort(pairs // len(tags), kind="stable")]
    offsets = np.zeros(len(lengths) + 1, np.int32)
    np.cumsum(np.bincount(pairs // len(tags), minlength=len(lengths)), out=offsets[1:])
    return pc.binary_join(pa.ListArray.from_arrays(pa.array(offsets), tags.take(pa.array(pairs % len(tags)))), " ")


def batches(num_rows: int, seed: int) -> Iterator[pa.RecordBatch]:
    rng = np.random.default_rng(seed)
    words = {category: vocabulary(rng, category, size) for category, (size, _, _) in CATEGORIES.items()}
    ids = rng.permutation(num_rows).astype(np.int64) * 2 + 1
    for start in range(0, num_rows, ROW_GROUP):
        count = min(ROW_GROUP, num_rows - start)
        columns = {
            f"tag_string_{category}": tag_strings(rng, words[category], np.maximum(rng.poisson(mean, count), least))
            for category, (_, mean, least) in CATEGORIES.items()
        }
        columns |= {
            "id": pa.array(ids[start : start + count]),
            "rating": pa.array(rng.choice(["g", "s", "q", "e"], count, p=[0.2, 0.5, 0.2, 0.1]), pa.string()),
            "score": pa.array(rng.geometric(0.08, count) - 3, pa.int64()),
            "fav_count": pa.array(rng.geometric(0.05, count), pa.int64()),
            "image_width": pa.array(rng.integers(400, 4000, count), pa.int64()),
            "image_height": pa.array(rng.integers(400, 4000, count), pa.int64()),
            "file_ext": pa.array(rng.choice(["jpg", "png"], count), pa.string()),
        }
        yield pa.RecordBatch.from_arrays(list(columns.values()), names=list(columns))


def write_dump(path: Path, num_rows: int, *, seed: int = 0) -> None:
    """Write the dump, a row group at a time."""
    writer = None
    for batch in batches(num_rows, seed):
        writer = writer or pq.ParquetWriter(path, batch.schema, compression="zstd")
        writer.write_batch(batch, row_group_size=ROW_GROUP)
    if writer is not None:
        writer.close()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("out", type=Path)
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    write_dump(options.out, options.rows, seed=options.seed)
