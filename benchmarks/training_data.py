"""From start to the first batch of a training set of millions, against loading its meta_lat.json (perf.md, row 7).

    python benchmarks/training_data.py             775,000, 3.1 and 12.4 million pictures (N, 4 N, 16 N), and the aims
    python benchmarks/training_data.py N [N …]     each with a made-up index and JSON of N pictures, 30 tags each
    python benchmarks/training_data.py --ours FOLDER | --json FOLDER     one contender, as it is measured

Writes about 0.4 kB a picture (with JSON 0.8) to a temporary folder; above --json-rows pictures only the index is made
and measured. Private memory is sampled every 10 ms once the first batch is there, until the second epoch is in order.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import pyarrow as pa

from sdxl_core.files import sha256_file
from sdxl_core.latents.index import BATCH_ROWS, ROWS, IndexWriter

BUCKETS_PX = [(64 * w, 64 * h) for w in range(8, 33) for h in range(8, 33) if 200 <= w * h <= 256]
TAGS_A_PICTURE, NUM_TAGS = 30, 20_000
RUNS = 3
AIM_ROWS, AIM_S, AIM_MIB = 12_400_000, 2.0, 500.0
ROWS_ASKED = [AIM_ROWS // 16, AIM_ROWS // 4, AIM_ROWS]


def make(folder: Path, num_rows: int, *, with_json: bool) -> None:
    """An index of `num_rows` pictures, and the JSON that it would have been made from."""
    latents = folder / "latents"
    latents.mkdir(parents=True)
    rng = np.random.default_rng(0)
    words = pa.array([f"tag_{number}" for number in range(NUM_TAGS)])
    metadata = folder / "meta_lat.json"
    with open(metadata, "wb") as file, IndexWriter(latents, fingerprint="f", made_from="m") as writer:
        file.write(b"{")
        first = writer.add_files(pa.array(["packed/a.npz"]), np.array([1]), "packed")
        for start in range(0, num_rows, BATCH_ROWS):
            count = min(BATCH_ROWS, num_rows - start)
            columns = _rows(rng, words, start, count) | {"file": np.full(count, first, np.int32)}
            writer.add(columns)
            if with_json:
                _write_json(file, columns, is_first=start == 0)
        file.write(b"\n}")
        file.flush()
        writer.finish(metadata_sha256=sha256_file(metadata))


def _rows(rng: np.random.Generator, words: pa.StringArray, start: int, count: int) -> dict[str, Any]:
    tags = words.take(pa.array((NUM_TAGS * rng.random(count * TAGS_A_PICTURE) ** 3).astype(np.int32)))
    offsets = pa.array(np.arange(count + 1, dtype=np.int32) * TAGS_A_PICTURE)
    lists = pa.ListArray.from_arrays(offsets, tags)
    sizes = np.array(BUCKETS_PX, np.int32)[rng.integers(0, len(BUCKETS_PX), count)]
    columns: dict[str, Any] = {
        field.name: np.zeros(count, field.type.to_pandas_dtype())
        for field in ROWS
        if field.type != pa.string() and field.name != "key_hash"
    }
    return columns | {
        "key": pa.array([f"{number % 1000:04d}/{number}" for number in range(start, start + count)]),
        "tags": pa.compute.binary_join(lists, ", "),
        "bucket_width_px": sizes[:, 0],
        "bucket_height_px": sizes[:, 1],
        "row": np.arange(start, start + count, dtype=np.int32),
    }


def _write_json(file: Any, columns: dict[str, Any], *, is_first: bool) -> None:
    lines = (
        f'\n  "{key}": {{\n    "tags": "{tags}",\n    "train_resolution": [\n      {w},\n      {h}\n    ]\n  }}'
        for key, tags, w, h in zip(
            columns["key"].to_pylist(), columns["tags"].to_pylist(),
            columns["bucket_width_px"].tolist(), columns["bucket_height_px"].tolist(), strict=True,
        )
    )  # fmt: skip
    file.write((("" if is_first else ",") + ",".join(lines)).encode())


def ours(folder: Path) -> None:
    """What a rank does from start to the first batch, then 200 batches more, and the memory that is its own."""
    start_s = time.perf_counter()
    from sdxl_core.config import TrainConfig
    from sdxl_core.training.order import batches_of_epoch
    from sdxl_core.training.training_set import read_training_set

    imported_s = time.perf_counter()
    config = TrainConfig(metadata=folder / "meta_lat.json", latents=folder / "latents", out=folder / "run")
    training_set = read_training_set(config)
    plan = training_set.plan(config)
    order = batches_of_epoch(plan, 0)
    first = order[0]
    first_s = time.perf_counter()
    training_set.take(first)
    text_s = time.perf_counter()
    highest = _sample_private()
    for number in range(200):
        training_set.take(order[number * (len(order) // 200)])
    again = batches_of_epoch(plan, 1)  # the look-ahead holds two epochs where they meet
    again[0]
    cpu_s = time.process_time()
    print(
        f"{first_s - imported_s:.3f} {text_s - first_s:.3f} {imported_s - start_s:.3f} {_memory_mib('RssAnon'):.0f} "
        f"{highest():.0f} {cpu_s:.2f}"
    )


def plain_json(folder: Path) -> None:
    """What a script does that reads all of it."""
    import json

    start_s = time.perf_counter()
    with open(folder / "meta_lat.json", encoding="utf-8") as file:
        metadata = json.load(file)
    buckets: dict[tuple[int, int], list[str]] = {}
    for key, entry in metadata.items():
        buckets.setdefault(tuple(entry["train_resolution"]), []).append(key)
    took_s = time.perf_counter() - start_s
    private = _memory_mib("RssAnon")
    print(f"{took_s:.3f} 0 0 {private:.0f} {private:.0f} {time.process_time():.2f}")


def _sample_private() -> Callable[[], float]:
    """Look at this process's private memory every 10 ms from now on. Returns what tells the highest, in MiB."""
    found = [_memory_mib("RssAnon")]

    def sample() -> None:
        while True:
            found.append(_memory_mib("RssAnon"))
            time.sleep(0.01)

    threading.Thread(target=sample, daemon=True).start()
    return lambda: max(found)


def _memory_mib(name: str) -> float:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(name)) / 1024


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("rows", type=int, nargs="*", default=ROWS_ASKED)
    parser.add_argument("--json-rows", type=int, default=1_000_000, help="largest N that json.load is measured at")
    parser.add_argument("--ours", type=Path, metavar="FOLDER")
    parser.add_argument("--json", type=Path, metavar="FOLDER")
    options = parser.parse_args()
    if options.ours or options.json:
        (ours if options.ours else plain_json)(options.ours or options.json)
        return
    from measure import machine

    print(machine())
    for rows in options.rows:
        with tempfile.TemporaryDirectory(prefix="training-data-") as name:
            make(Path(name), rows, with_json=rows <= options.json_rows)
            _compare(Path(name), rows, with_json=rows <= options.json_rows)


def _compare(folder: Path, rows: int, *, with_json: bool) -> None:
    import subprocess

    words = ["--ours", "--json"] if with_json else ["--ours"]
    found: dict[str, list[list[float]]] = {word: [] for word in words}
    for _ in range(RUNS):
        for word in words:
            command = [sys.executable, __file__, word, str(folder)]
            output = subprocess.run(command, check=True, capture_output=True, text=True).stdout
            found[word].append([float(value) for value in output.split()])
    for word in words:
        first, text, imports, private, peak, cpu = (median(run[i] for run in found[word]) for i in range(6))
        print(
            f"{rows:>10,} {word[2:]:>5}: first batch of indices {first:.2f} s, its texts {text:.2f} s more, imports "
            f"{imports:.2f} s, private {private:,.0f} MiB (highest {peak:,.0f}), {cpu:.2f} cpu-s",
            flush=True,
        )
        if word == "--ours" and rows == AIM_ROWS:
            for what, value, aim in (("s from start", first + imports, AIM_S), ("MiB private, highest", peak, AIM_MIB)):
                print(f"{what}: {value:,.2f}, aim at most {aim:,.0f}: {'met' if value <= aim else 'MISSED'}")


if __name__ == "__main__":
    main()
