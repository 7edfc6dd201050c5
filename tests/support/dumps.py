"""Metadata dumps as booru sites have them, made up from a seed."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

SHARES = {"general": 24, "character": 2, "copyright": 2, "artist": 1, "meta": 4}  # tags a row, on average
NUM_TAGS = {"general": 40_000, "character": 30_000, "copyright": 5_000, "artist": 24_500, "meta": 500}


def danbooru_tables(num_rows: int, *, seed: int = 0, block: int = 65_536) -> Iterator[pa.Table]:
    """Blocks of rows with the columns of Danbooru's dump; ids shuffled, tags from a Zipf vocabulary of 100,000."""
    rng = np.random.default_rng(seed)
    ids = rng.permutation(num_rows) + 1
    words = {name: _words(name, count) for name, count in NUM_TAGS.items()}
    for start in range(0, num_rows, block):
        count = min(block, num_rows - start)
        tags = {name: _tag_strings(rng, words[name], share, count) for name, share in SHARES.items()}
        parent = rng.integers(1, 10_000_000, count).astype(np.float64)
        parent[rng.random(count) < 0.8] = np.nan
        yield pa.table(
            {
                "id": pa.array(ids[start : start + count]),
                "created_at": pa.array(["2024-01-31T12:00:00.000-05:00"] * count),
                "score": pa.array(rng.integers(-10, 500, count)),
                "fav_count": pa.array(rng.integers(0, 900, count)),
                "rating": pa.array(rng.choice(["g", "s", "q", "e"], count, p=[0.2, 0.5, 0.15, 0.15])),
                "image_width": pa.array(rng.integers(200, 4000, count)),
                "image_height": pa.array(rng.integers(200, 4000, count)),
                "file_ext": pa.array(rng.choice(["jpg", "png"], count)),
                "parent_id": pa.array(parent),
                **{f"tag_string_{name}": texts for name, texts in tags.items()},
            }
        )


def write_dump(path: Path, num_rows: int, *, seed: int = 0, row_group_size: int = 1 << 20) -> None:
    """One parquet file whose id is the pandas index, row groups as pandas makes them."""
    writer = None
    pending: list[pa.Table] = []

    def flush() -> None:
        nonlocal writer
        table = pa.concat_tables(pending)
        pending.clear()
        if writer is None:
            pandas = b'{"index_columns": ["id"], "columns": [], "column_indexes": []}'
            writer = pq.ParquetWriter(path, table.schema.with_metadata({b"pandas": pandas}))
        writer.write_table(table.replace_schema_metadata(writer.schema.metadata), row_group_size=row_group_size)

    for table in danbooru_tables(num_rows, seed=seed):
        pending.append(table)
        if sum(part.num_rows for part in pending) >= row_group_size:
            flush()
    if pending:
        flush()
    if writer is not None:
        writer.close()


def _words(category: str, count: int) -> np.ndarray:
    odd = [";p", "^_^", ":3", "<o>_<o>", "to_heart_(series)", "日本", "pokémon"]
    return np.array([f"{odd[n % len(odd)] if n % 10 == 3 else category}_{n:x}" for n in range(count)], dtype=object)


def _tag_strings(rng: np.random.Generator, words: np.ndarray, share: int, count: int) -> pa.Array:
    """Tags joined by spaces: Zipf-like ranks, none twice in a row, "" for none."""
    lengths = rng.poisson(share, count)
    ranks = np.exp(rng.random(int(lengths.sum())) * np.log(len(words))).astype(np.int64) - 1
    rows = np.repeat(np.arange(count), lengths)
    pairs = np.unique(rows * len(words) + ranks)
    rows, ranks = pairs // len(words), pairs % len(words)
    offsets = np.concatenate([[0], np.cumsum(np.bincount(rows, minlength=count))]).astype(np.int32)
    lists = pa.ListArray.from_arrays(pa.array(offsets), pa.array(words, pa.string()).take(pa.array(ranks)))
    return pa.compute.binary_join(lists, " ")
