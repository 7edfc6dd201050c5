"""Latent files: ours written, read and verified against np.savez and np.load, alternately in one run, on one thread.

    python benchmarks/latent_files.py [--sizes 150,600,2400] [--repeats 5] [--folder DIR]

One minute on a quiet core. Latents have the sizes of SDXL's buckets about 1024 x 1024 px, so that a picture's float32
file has about 263 kB. What is read is in the page cache, as are np.load's files. "bare" rows are system calls alone,
without any work of ours: what a file system and memory cost whoever writes or reads the same bytes.
"""

from __future__ import annotations

import argparse
import os
import random
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pyarrow as pa
from measure import Aim, aims_table, machine

from sdxl_core.latents import LatentRecord, LatentStore
from sdxl_core.latents.formats import PackedFile, WrittenFile, read_per_image, write_packed, write_per_image
from sdxl_core.latents.formats.record import is_finite
from sdxl_core.latents.index import IndexWriter

SHAPES = ((128, 128), (152, 104), (104, 152), (144, 112), (112, 144), (168, 96), (96, 168), (120, 136))
GROUP = 512  # pictures of one commit group
POOL = 16 * len(SHAPES)  # different pictures
BARE = "bare open, write, close, rename"
AIMS = {
    "write: per_image": 2.2, "write: packed float16": 2.2, "write: packed float32": 2.2,
    "read at random: per_image file": 4, "read at random: store, ours": 4,
    "read at random: store, packed16": 6, "read at random: store, packed32": 6,
    "verify: per_image": 2.5, "verify: packed 16": 2.5, "verify: packed 32": 2.5,
}  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--sizes", default="150,600,2400")
    parser.add_argument("--repeats", type=int, default=5)
    memory = Path("/dev/shm") if Path("/dev/shm").is_dir() else None
    parser.add_argument("--folder", type=Path, default=memory, help="on which file system (default: in memory)")
    options = parser.parse_args()
    print(machine())
    print(f"\nmedians of {options.repeats} alternating runs, one thread unless said; written by rename, not synced\n")
    print("| pictures | what | us a picture | cpu, us a picture | rival / it |")
    print("|---|---|---|---|---|")
    sizes = [int(size) for size in options.sizes.split(",")]
    found: dict[str, list[float]] = {}
    for size in sizes:
        with tempfile.TemporaryDirectory(prefix="latent_files_", dir=options.folder) as folder:
            comparison = Comparison(Path(folder), size, options.repeats)
            comparison.run()
        for what, ratio in comparison.ratios.items():
            found.setdefault(what, []).append(ratio)
    print(f"\nAgainst numpy, at {', '.join(map(str, sizes))} pictures:\n")
    print("\n".join(aims_table([aim(what, asked, found[what]) for what, asked in AIMS.items()])))


def aim(what: str, asked: float, ratios: list[float]) -> Aim:
    """Held by the largest size."""
    return Aim(what, f"{asked} x", f"{', '.join(f'{ratio:.2f}' for ratio in ratios)} x", ratios[-1] >= asked)


class Comparison:
    """All contenders with the same `size` pictures."""

    def __init__(self, folder: Path, size: int, repeats: int) -> None:
        self.folder, self.size, self.repeats = folder, size, repeats
        rng = np.random.default_rng(0)
        pool = [record(rng, SHAPES[number % len(SHAPES)]) for number in range(POOL)]
        self.records = [pool[number % len(pool)] for number in range(size)]
        self.keys = [f"danbooru/{number}" for number in range(size)]
        self.order = list(range(size))
        random.Random(0).shuffle(self.order)
        self.ratios: dict[str, float] = {}  # rival's time by ours, medians

    def run(self) -> None:
        for name in ("numpy/danbooru", "bare/danbooru", "ours/danbooru", "packed16", "packed32"):
            (self.folder / name).mkdir(parents=True)
        self.per_image()
        data = [(self.folder / "ours" / f"{key}.npz").read_bytes() for key in self.keys[:POOL]]
        self.data = [data[number % POOL] for number in range(self.size)]
        writers = {"np.savez": self.savez, BARE: self.bare_files, "per_image": self.per_image}
        writers |= {"packed float16": lambda: self.packed("float16"), "packed float32": lambda: self.packed("float32")}
        self.compare("write", writers, "np.savez")
        self.write_indexes()
        stores = {name: LatentStore(self.folder / name) for name in ("ours", "packed16", "packed32")}
        rows = self.open_rows()
        readers = {"np.load": self.load, "bare pread, float32": lambda: self.bare_rows(rows)}
        readers["per_image file"] = self.read_files
        readers |= {f"store, {name}": (lambda store=store: self.read_store(store)) for name, store in stores.items()}
        self.compare("read at random", readers, "np.load")
        verify = {"np.load of everything": self.load, "per_image": self.verify_files}
        verify |= {f"packed {bits}": (lambda bits=bits: self.verify_packed(bits)) for bits in ("16", "32")}
        self.compare("verify", verify, "np.load of everything")
        for bits in ("16", "32"):
            name = f"np.load of packed {bits}"
            contenders = {
                name: lambda bits=bits: self.load_packed(bits),
                f"packed {bits}, 1 thread": lambda bits=bits: self.verify_packed(bits),
                f"packed {bits}, as `verify` does, 4 threads": lambda bits=bits: self.verify_packed(bits, threads=4),
            }
            self.compare("verify", contenders, name)

    def compare(self, what: str, contenders: dict[str, Callable[[], None]], rival: str) -> None:
        wall: dict[str, list[float]] = {name: [] for name in contenders}
        cpu: dict[str, list[float]] = {name: [] for name in contenders}
        for repeat in range(self.repeats + 1):
            for name, work in contenders.items():
                if what == "write":
                    self.clear(name)
                begin, begin_cpu = time.perf_counter(), time.process_time()
                work()
                if repeat:  # the first run warms up
                    wall[name].append(time.perf_counter() - begin)
                    cpu[name].append(time.process_time() - begin_cpu)
        for name in contenders:
            ratios = [theirs / ours for theirs, ours in zip(wall[rival], wall[name], strict=True)]
            us, cpu_us = (statistics.median(values[name]) / self.size * 1e6 for values in (wall, cpu))
            self.ratios[f"{what}: {name}"] = statistics.median(ratios)
            spread = f"{statistics.median(ratios):.2f} ({min(ratios):.2f}-{max(ratios):.2f})"
            print(f"| {self.size} | {what}: {name} | {us:.1f} | {cpu_us:.1f} | {spread} |", flush=True)

    def clear(self, name: str) -> None:
        folders = {"np.savez": "numpy/danbooru", "per_image": "ours/danbooru", BARE: "bare/danbooru"}
        path = self.folder / folders.get(name, name.replace("packed float", "packed"))
        shutil.rmtree(path)
        path.mkdir()

    def savez(self) -> None:
        for key, item in zip(self.keys, self.records, strict=True):
            np.savez(
                self.folder / "numpy" / f"{key}.npz",
                latents=item.latents,
                original_size=np.array([item.original_width_px, item.original_height_px]),
                crop_ltrb=np.array(item.crop_ltrb),
            )

    def bare_files(self) -> None:
        for key, data in zip(self.keys, self.data, strict=True):
            path = f"{self.folder}/bare/{key}"
            handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o666)
            os.write(handle, data)
            os.close(handle)
            os.rename(path, f"{path}.npz")

    def per_image(self) -> None:
        folder = self.folder / "ours"
        self.written = [
            write_per_image(folder / f"{key}.npz", item) for key, item in zip(self.keys, self.records, strict=True)
        ]

    def packed(self, dtype: str) -> None:
        """Files as the cache writes them: one a commit group and bucket."""
        self.files: list[tuple[str, list[int], WrittenFile]] = []
        for start in range(0, self.size, GROUP):
            for shape in range(len(SHAPES)):
                rows = [n for n in range(start, min(start + GROUP, self.size)) if n % len(SHAPES) == shape]
                path = f"{shape}-{start}.npz"
                keys, records = [self.keys[row] for row in rows], [self.records[row] for row in rows]
                written = write_packed(self.folder / f"packed{dtype[5:]}" / path, keys, records, dtype)  # type: ignore[arg-type]
                self.files.append((path, rows, written))

    def write_indexes(self) -> None:
        paths = [f"{key}.npz" for key in self.keys]
        crcs = [written.crc32 for written in self.written]
        self.index("ours", "per_image", paths, list(range(self.size)), [-1] * self.size, crcs)
        for dtype in ("float16", "float32"):
            self.packed(dtype)
            file, row, checksum = [0] * self.size, [0] * self.size, [0] * self.size
            for number, (_, rows, written) in enumerate(self.files):
                for at, picture in enumerate(rows):
                    file[picture], row[picture], checksum[picture] = number, at, written.row_crc32s[at]
            self.index(f"packed{dtype[5:]}", "packed", [path for path, _, _ in self.files], file, row, checksum)

    def index(
        self, name: str, layout: str, paths: list[str], file: list[int], row: list[int], crc32: list[int]
    ) -> None:
        folder, zeros = self.folder / name, np.zeros(self.size)
        with IndexWriter(folder, fingerprint="", made_from="") as index:
            index.add_files(pa.array(paths), np.array([(folder / path).stat().st_size for path in paths]), layout)
            sides = {f"{what}_{side}_px": zeros.astype(int) for what in ("bucket", "original") for side in SIDES}
            crops = {f"crop_{side}": zeros for side in ("left", "top", "right", "bottom")}
            index.add({"key": self.keys, "file": file, "row": row, "crc32": crc32} | sides | crops)
            index.finish(metadata_sha256="")

    def load(self) -> None:
        for number in self.order:
            with np.load(self.folder / "numpy" / f"{self.keys[number]}.npz") as file:
                _ = file["latents"], file["original_size"], file["crop_ltrb"]

    def open_rows(self) -> list[tuple[int, int, tuple[int, ...]]]:
        """Handle, place and shape of each picture's row in the packed float32 files."""
        found: list[tuple[int, int, tuple[int, ...]]] = [(0, 0, ())] * self.size
        for path, rows, _ in self.files:
            handle = os.open(self.folder / "packed32" / path, os.O_RDONLY)
            for at, picture in enumerate(rows):
                latents = self.records[picture].latents
                found[picture] = handle, at * latents.nbytes + HEAD_BYTES, latents.shape
        return found

    def bare_rows(self, rows: list[tuple[int, int, tuple[int, ...]]]) -> None:
        for number in self.order:
            handle, start, shape = rows[number]
            os.preadv(handle, [np.empty(shape, np.float32).data], start)

    def load_packed(self, bits: str) -> None:
        for path, _, _ in self.files:
            with np.load(self.folder / f"packed{bits}" / path) as file:
                for name in file.files:
                    _ = file[name]

    def read_files(self) -> None:
        for number in self.order:
            read_per_image(self.folder / "ours" / f"{self.keys[number]}.npz")

    def read_store(self, store: LatentStore) -> None:
        for number in self.order:
            store.read(self.keys[number])

    def verify_files(self) -> None:
        for key, written in zip(self.keys, self.written, strict=True):
            item = read_per_image(self.folder / "ours" / f"{key}.npz", expected_crc32=written.crc32)
            assert all(is_finite(array) for _, array in item.arrays())

    def verify_packed(self, bits: str, *, threads: int = 1) -> None:
        def verify(path: str) -> None:
            check = PackedFile(self.folder / f"packed{bits}" / path).verify()
            assert not (check.is_damaged or check.damaged_rows or check.infinite_rows)

        paths = [path for path, _, _ in self.files]
        if threads == 1:
            list(map(verify, paths))
            return
        with ThreadPoolExecutor(threads) as pool:
            list(pool.map(verify, paths))


SIDES = ("width", "height")
HEAD_BYTES = 189  # in front of the first row


def record(rng: np.random.Generator, shape: tuple[int, int]) -> LatentRecord:
    latents = rng.normal(scale=7, size=(4, *shape)).astype(np.float32)
    return LatentRecord(
        latents=latents, original_width_px=1500, original_height_px=2000, crop_ltrb=(0.0, 64.0, 768.0, 1344.0)
    )


if __name__ == "__main__":
    main()
