"""Preparation of pictures against Pillow + OpenCV: the same bucket pixels, bit for bit, in cpu seconds a picture.

    python -m benchmarks.decode [--rounds 5] [--real FOLDER] [--out benchmarks/decode.md]

Two minutes on two quiet cores. Each contender has a process of its own (ours keeps freed memory, which must not help
the rival), and they take turns.
"""

from __future__ import annotations

import argparse
import io
import multiprocessing as mp
import statistics
import time
from concurrent.futures import ThreadPoolExecutor
from multiprocessing.connection import Connection
from pathlib import Path

import cv2
import numpy as np
from numpy.typing import NDArray
from PIL import Image

from benchmarks.made_pictures import KINDS, made_file
from benchmarks.measure import Aim, aims_table, machine, titled
from sdxl_core.buckets import BucketTable
from sdxl_core.config import LatentsOptions
from sdxl_core.images.decode import decode_pixels, read_header
from sdxl_core.images.prepare import fit_to_bucket
from sdxl_core.latents.engine.heap import keep_freed_memory

WIDTH_PX, HEIGHT_PX = 1712, 2400
RATIO, RATE = 1.5, 14.0  # asked for: of webp and png, in cpu time; images a second a core
OPTIONS = LatentsOptions(compat="sd-scripts")
TABLE = BucketTable.from_options(OPTIONS)


def ours(data: bytes) -> NDArray[np.uint8]:
    header = read_header(data, compat=OPTIONS.compat)
    choice = TABLE.choose(width_px=header.width_px, height_px=header.height_px)
    pixels = decode_pixels(data, header, compat=OPTIONS.compat, background=OPTIONS.background)
    return fit_to_bucket(pixels.rgb, choice)


def rival(data: bytes) -> NDArray[np.uint8]:
    """As sd-scripts prepares a picture: Pillow to RGB, OpenCV's area or Pillow's Lanczos, centre crop."""
    image = np.array(Image.open(io.BytesIO(data)).convert("RGB"))
    choice = TABLE.choose(width_px=image.shape[1], height_px=image.shape[0])
    size = choice.resized_width_px, choice.resized_height_px
    if image.shape[1] >= size[0] and image.shape[0] >= size[1]:
        image = cv2.resize(image, size, interpolation=cv2.INTER_AREA)
    else:
        image = np.array(Image.fromarray(image).resize(size, Image.Resampling.LANCZOS))
    top, left = choice.crop_top_px, choice.crop_left_px
    return image[top : top + choice.bucket.height_px, left : left + choice.bucket.width_px]


def serve(pipe: Connection, name: str) -> None:
    """Answer (files, threads) with cpu seconds, wall seconds and a digest of all pixels."""
    import hashlib

    cv2.setNumThreads(1)
    if name == "ours":
        keep_freed_memory()
    prepare = {"ours": ours, "rival": rival}[name]
    while (job := pipe.recv()) is not None:
        files, threads = job
        cpu, wall = time.process_time(), time.perf_counter()
        with ThreadPoolExecutor(threads) as pool:
            done = list(pool.map(prepare, files)) if threads > 1 else [prepare(data) for data in files]
        cpu, wall = time.process_time() - cpu, time.perf_counter() - wall
        digest = hashlib.sha256(b"".join(pixels.tobytes() for pixels in done)).hexdigest()
        pipe.send((cpu, wall, digest))


class Contender:
    def __init__(self, name: str) -> None:
        context = mp.get_context("spawn")
        self._pipe, theirs = context.Pipe()
        self._process = context.Process(target=serve, args=(theirs, name), daemon=True)
        self._process.start()

    def run(self, files: list[bytes], threads: int = 1) -> tuple[float, float, str]:
        self._pipe.send((files, threads))
        answer: tuple[float, float, str] = self._pipe.recv()
        return answer

    def close(self) -> None:
        self._pipe.send(None)
        self._process.join()


def compare(contenders: dict[str, Contender], files: list[bytes], rounds: int, threads: int = 1) -> dict[str, float]:
    """Milliseconds of cpu a picture and pictures a second by contender, medians over alternating rounds."""
    cpu: dict[str, list[float]] = {name: [] for name in contenders}
    rate: dict[str, list[float]] = {name: [] for name in contenders}
    for number in range(rounds + 1):
        digests = set()
        for name, contender in contenders.items():
            cpu_s, wall_s, digest = contender.run(files, threads)
            digests.add(digest)
            if number:  # the first round warms up
                cpu[name].append(1000 * cpu_s / len(files))
                rate[name].append(len(files) / wall_s)
        assert len(digests) == 1, "the contenders' pixels differ"
    found = {f"{name} ms": statistics.median(values) for name, values in cpu.items()}
    return found | {f"{name} rate": statistics.median(values) for name, values in rate.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--pictures", type=int, default=4)
    parser.add_argument("--real", type=Path, help="a folder of real pictures")
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    contenders = {name: Contender(name) for name in ("rival", "ours")}
    lines = [
        f"{WIDTH_PX} x {HEIGHT_PX} px to buckets of 1024 px squared, as sd-scripts does it; the same pixels.",
        "", "| kind | kB a file | Pillow + OpenCV, cpu ms | ours, cpu ms | ratio | ours, images/s a core |",
        "|---|---|---|---|---|---|",
    ]  # fmt: skip
    aims = []

    def row(name: str, files: list[bytes]) -> None:
        found = compare(contenders, files, arguments.rounds)
        size = statistics.mean(map(len, files)) / 1000
        ratio = found["rival ms"] / found["ours ms"]
        lines.append(
            f"| {name} | {size:.0f} | {found['rival ms']:.1f} | {found['ours ms']:.1f} | {ratio:.2f} x | "
            f"{1000 / found['ours ms']:.1f} |"
        )
        print(lines[-1], flush=True)
        if name in KINDS and name != "jpg":
            rate = 1000 / found["ours ms"]
            aims.append(Aim(f"{name}, 4 MP", f"{RATIO} x", f"{ratio:.2f} x", ratio >= RATIO))
            aims.append(Aim(f"{name}, 4 MP", f"{RATE:.0f} images/s a core", f"{rate:.1f}", rate >= RATE))

    made = {k: [made_file(k, WIDTH_PX, HEIGHT_PX, seed) for seed in range(arguments.pictures)] for k in KINDS}
    for kind, files in made.items():
        row(kind, files)
    if arguments.real:
        paths = sorted(path for path in arguments.real.rglob("*") if path.suffix == ".png")
        row(f"{len(paths)} real PNGs", [path.read_bytes() for path in paths])
    lines += ["", "| webp pictures | ours, cpu ms a picture |", "|---|---|"]
    for times in (1, 4, 16):
        found = compare({"ours": contenders["ours"]}, made["webp"] * times, 1)
        lines.append(f"| {len(made['webp']) * times} | {found['ours ms']:.1f} |")
    lines += ["", "| threads | webp: rival, images/s | ours | png: rival | ours |", "|---|---|---|---|---|"]
    for threads in (1, 2):
        rates = [compare(contenders, made[kind] * 2, arguments.rounds, threads) for kind in ("webp", "png")]
        values = [f"{found[f'{name} rate']:.1f}" for found in rates for name in ("rival", "ours")]
        lines.append(f"| {threads} | {' | '.join(values)} |")
    for contender in contenders.values():
        contender.close()
    text = "\n".join([*lines, "", *aims_table(aims), "", machine(), ""])
    print(text)
    if arguments.out:
        arguments.out.write_text(titled("Preparation of pictures against Pillow + OpenCV", text))


if __name__ == "__main__":
    main()
