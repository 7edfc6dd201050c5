"""Latents on a card: SDXL's VAE at full size with random weights, from real webp files to `.npz`, without Prefect.

    python -m benchmarks.gpu_latents [--device 0] [--dtype bfloat16] [--compile] [--out benchmarks/gpu_latents.md]
    python -m benchmarks.gpu_latents --preset tiny --device cpu --dtype float32 --pictures 8     # tries the script

It makes its own pictures. For 1024 x 1024 px and for a mix of buckets it measures, in one run: the VAE alone on batches
that lie on the card, the engine end to end, and the loop that people ran. Only sdxl_core is imported.
"""

from __future__ import annotations

import argparse
import multiprocessing as mp
import os
import statistics
import tempfile
import time
from collections import Counter
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import Any

import torch

from benchmarks.files_to_latents import engine_run, loop_rate
from benchmarks.made_pictures import made_file
from benchmarks.measure import machine
from sdxl_core.buckets import Bucket, BucketTable
from sdxl_core.config import CacheLatentsConfig
from sdxl_core.latents.engine import EngineReport
from sdxl_core.latents.engine.batch_size import settled_batch_size
from sdxl_core.latents.vae import DTYPES, EncodeFunction, compiled, load_encoder
from sdxl_core.models.presets import component_config

SETS = {
    "1024 x 1024": [(2048, 2048)],
    "mixed buckets": [(1712, 2400), (2400, 1712), (2048, 2048), (1536, 2688), (1920, 2176), (2560, 1600)],
}
SMALLER = 8  # with the tiny preset everything is this many times smaller
NUM_DRAWN = 24  # distinct pictures; the rest are copies, which cost the same to read and decode


@cache
def random_encoder(preset: str, name: str, dtype: str, device: torch.device) -> EncodeFunction:
    """The encoder of a VAE of this size; random weights take as long as trained ones. `name` is not looked at."""
    if preset == "tiny":
        return load_encoder("tiny", dtype, device)
    import diffusers

    torch.manual_seed(0)
    vae: Any = diffusers.AutoencoderKL(**component_config("sdxl", "vae")).eval()
    del vae.decoder  # nothing here decodes
    vae.to(device=device, dtype=DTYPES[dtype], memory_format=torch.channels_last)

    def encode(pixels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        images = pixels.permute(0, 3, 1, 2).float().div_(255).sub_(0.5).div_(0.5)
        posterior = vae.encode(images.to(DTYPES[dtype], memory_format=torch.channels_last)).latent_dist
        return posterior.mean, posterior.logvar

    return encode


@dataclass(frozen=True)
class Measured:
    """Images a second: the VAE alone, the engine, the loop; and the engine's own report."""

    vae: float
    engine: float
    loop: float
    report: EngineReport


def draw(root: Path, sizes: list[tuple[int, int]], num: int) -> list[Path]:
    """webp files in `root`."""
    root.mkdir()
    drawn = min(num, NUM_DRAWN)
    with ProcessPoolExecutor(min(16, os.cpu_count() or 1), mp.get_context("spawn")) as pool:
        jobs = [pool.submit(made_file, "webp", *sizes[n % len(sizes)], n) for n in range(drawn)]
        files = [job.result() for job in jobs]
    paths = [root / f"{number:05}.webp" for number in range(num)]
    for number, path in enumerate(paths):
        path.write_bytes(files[number % drawn])
    return paths


def vae_rate(
    config: CacheLatentsConfig, encode: EncodeFunction, counts: Counter[Bucket], device: torch.device
) -> float:
    """Images a second of full batches that lie on the device, buckets in the share they have among the pictures."""
    seconds = 0.0
    if config.compile:
        encode = compiled(encode)
    for bucket, count in counts.items():
        shape = (config.batch_size, bucket.height_px, bucket.width_px, 3)
        pixels = torch.randint(0, 256, shape, dtype=torch.uint8, device=device)
        times = [_seconds(encode, pixels, device) for _ in range(4)]
        seconds += statistics.median(times[1:]) * count / config.batch_size
    return counts.total() / seconds


@torch.inference_mode()
def _seconds(encode: EncodeFunction, pixels: torch.Tensor, device: torch.device) -> float:
    _wait(device)
    started = time.perf_counter()
    encode(pixels)
    _wait(device)
    return time.perf_counter() - started


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def measure(config: CacheLatentsConfig, paths: list[Path], arguments: argparse.Namespace) -> Measured:
    device = torch.device("cpu" if arguments.device == "cpu" else "cuda:0")
    load = partial(random_encoder, arguments.preset)
    encode = load(config.vae, config.dtype, device)
    table = BucketTable.from_options(config)
    sizes = SETS[paths[0].parent.name]
    shrink = SMALLER if arguments.preset == "tiny" else 1
    choices = [table.choose(width_px=w // shrink, height_px=h // shrink) for w, h in sizes]
    counts = Counter(choices[number % min(len(paths), NUM_DRAWN) % len(sizes)].bucket for number in range(len(paths)))
    engine_run(config, paths[: 4 * config.batch_size], arguments.device, load)  # warm up, compile
    vae = vae_rate(config, encode, counts, device)
    reports = [engine_run(config, paths, arguments.device, load) for _ in range(arguments.rounds)]
    report = sorted(reports, key=lambda one: one.images_per_s)[len(reports) // 2]
    loop = loop_rate(config, paths[: max(4, len(paths) // 8)], encode, device)
    return Measured(vae, report.images_per_s, loop, report)


def settings(arguments: argparse.Namespace, root: Path) -> CacheLatentsConfig:
    shrink = SMALLER if arguments.preset == "tiny" else 1
    config = CacheLatentsConfig(
        source=root, metadata=root, out=root / "out", vae="tiny", compat="sd-scripts", dtype=arguments.dtype,
        batch_size=arguments.batch_size, compile=arguments.compile, devices=arguments.device,
        resolution_px=1024 // shrink, min_bucket_px=256 // shrink, max_bucket_px=2048 // shrink,
        bucket_step_px=64 // shrink,
    )  # fmt: skip
    device = torch.device("cpu" if arguments.device == "cpu" else "cuda:0")
    found = settled_batch_size(config, device, partial(random_encoder, arguments.preset))
    return config.model_copy(update={"batch_size": found})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", choices=["sdxl", "tiny"], default="sdxl")
    parser.add_argument("--device", default="0", help="a card's number, or cpu")
    parser.add_argument("--dtype", choices=list(DTYPES), default="bfloat16")
    parser.add_argument("--batch-size", type=int, default=0, help="0: found by trying")
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--pictures", type=int, default=2048)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    if arguments.device != "cpu":
        os.environ["CUDA_VISIBLE_DEVICES"] = arguments.device
    shrink = SMALLER if arguments.preset == "tiny" else 1
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        config = settings(arguments, Path(folder))
        config.out.mkdir(exist_ok=True)
        for name, sizes in SETS.items():
            paths = draw(Path(folder) / name, [(w // shrink, h // shrink) for w, h in sizes], arguments.pictures)
            rows.append((name, measure(config, paths, arguments)))
    card = "cpu" if arguments.device == "cpu" else torch.cuda.get_device_name(0)
    lines = [
        f"{arguments.preset} VAE, {config.dtype}{', compiled' if config.compile else ''}, batch {config.batch_size}, "
        f"{arguments.pictures} webp files of {4 if shrink == 1 else 4 / shrink**2} MP on {card}, "
        f"{len(os.sched_getaffinity(0))} cores; median of {arguments.rounds}.",
        "", "| pictures | VAE alone, images/s | engine | share of it | device busy | bound by | the loop | ratio |",
        "|---|---|---|---|---|---|---|---|",
    ]  # fmt: skip
    for name, one in rows:
        lines.append(
            f"| {name} | {one.vae:.1f} | {one.engine:.1f} | {one.engine / one.vae:.0%} | "
            f"{one.report.busy['vae']:.0%} | {one.report.bound_by} | {one.loop:.1f} | {one.engine / one.loop:.1f} x |"
        )
    text = "\n".join([*lines, "", f"{machine()}, torch {torch.__version__}", ""])
    print(text)
    if arguments.out:
        arguments.out.write_text(text)


if __name__ == "__main__":
    main()
