"""The engine with a device of a set speed, and against the loop that people ran, in one run.

    python -m benchmarks.engine [--pictures 768] [--out benchmarks/engine.md]

Four minutes on two quiet cores; --pictures 192 --commit-size 64 takes one and a half.
The device is a stand-in that sleeps for each picture; everything before and after it is real: 4 MP webp files are read,
decoded, fitted, batched, and `.npz` files are written and synced.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch

from benchmarks.files_to_latents import engine_run, loop_rate
from benchmarks.made_pictures import made_file
from benchmarks.measure import Aim, aims_table, machine, titled
from sdxl_core.config import CacheLatentsConfig
from sdxl_core.latents.engine import EngineReport
from sdxl_core.latents.vae import EncodeFunction, LoadFunction, load_encoder

TITLE = "The engine with a device of a set speed, and against the loop that people ran"
LOOP = (
    "The loop: decode, resize, encode, `gc.collect()`, `np.savez`, one picture after another. With a VAE on the cpu "
    "both wait for the same cores, and there is nothing to win."
)
NUM_DRAWN = 12
SPEEDS = {0.6: "60 % of the decode rate", 4.0: "four times the decode rate"}
SIZES = [(1712, 2400), (2400, 1712), (2024, 2024)]


def sleeper(seconds: float) -> LoadFunction:
    """A device that takes `seconds` a picture and none of this machine's cores."""

    def load(vae: str, dtype: str, device: torch.device) -> EncodeFunction:
        def encode(pixels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            time.sleep(seconds * len(pixels))
            mean = torch.zeros((len(pixels), 4, pixels.shape[1] // 8, pixels.shape[2] // 8))
            return mean, mean

        return encode

    return load


def run(config: CacheLatentsConfig, paths: list[Path], load: LoadFunction) -> tuple[EngineReport, float]:
    """The report, and the milliseconds of cpu a picture that the calling thread took."""
    before = time.thread_time()
    report = engine_run(config, paths, "cpu", load)
    return report, 1000 * (time.thread_time() - before) / len(paths)


def rival_rate(config: CacheLatentsConfig, paths: list[Path], load: LoadFunction) -> float:
    cpu = torch.device("cpu")
    return loop_rate(config, paths, load("tiny", "float32", cpu), cpu)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--pictures", type=int, default=768)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--commit-size", type=int, default=256)
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        paths = []
        for number in range(arguments.pictures):
            paths.append(root / f"{number:04}.webp")
            if number < NUM_DRAWN:
                paths[-1].write_bytes(made_file("webp", *SIZES[number % 3], number))
            else:  # drawing a picture costs more than reading one
                paths[-1].hardlink_to(paths[number % NUM_DRAWN])
        config = CacheLatentsConfig(
            source=root, metadata=root, out=root / "out", vae="tiny", devices="cpu", compat="sd-scripts",
            commit_size=arguments.commit_size,
        )  # fmt: skip
        config.out.mkdir()
        text = measured(config, paths, arguments.rounds)
    print(text)
    if arguments.out:
        arguments.out.write_text(titled(TITLE, text))


def measured(config: CacheLatentsConfig, paths: list[Path], rounds: int) -> str:
    torch.set_num_threads(1)  # the stand-in needs none; a VAE on the cpu would fight with decoding for two cores
    run(config, paths[:16], sleeper(0))  # warm up
    decode = statistics.median(run(config, paths[:64], sleeper(0))[0].images_per_s for _ in range(rounds + 1))
    heads = (
        "device",
        "pictures",
        "images/s",
        "device busy",
        "decode busy",
        "bound by",
        "calling thread, cpu ms a picture",
    )
    lines = [
        f"webp files of 4 MP, buckets of 1024 px squared, batch 4, commit groups of {config.commit_size}, "
        f"{rounds} rounds, medians. Decoding alone gives {decode:.1f} images/s.",
        "",
        f"| {' | '.join(heads)} |",
        "|---" * len(heads) + "|",
    ]
    aims = []
    for speed, name in SPEEDS.items():
        for share in (16, 4, 1) if speed < 1 else (16, 4):
            some = paths[: max(4, len(paths) // share)]
            found = [run(config, some, sleeper(1 / (speed * decode))) for _ in range(rounds)]
            report, own_ms = sorted(found, key=lambda pair: pair[0].busy["vae"])[len(found) // 2]
            lines.append(
                f"| {name}: {speed * decode:.1f}/s | {len(some)} | {report.images_per_s:.1f} | "
                f"{report.busy['vae']:.1%} | {report.busy['decode']:.1%} | {report.bound_by} | {own_ms:.2f} |"
            )
            print(lines[-1], flush=True)
        if speed < 1:
            busy = statistics.mean(report.busy["vae"] for report, _ in found)
            aims.append(Aim(f"device at {name} busy", "95 %", f"{busy:.1%}", busy >= 0.95))
        else:
            bounds = {report.bound_by for report, _ in found}
            aims.append(Aim(f"device at {name}", "bound by decode", ", ".join(sorted(bounds)), bounds == {"decode"}))
    lines += ["", "| device | the loop, images/s | the engine | ratio |", "|---|---|---|---|"]
    contenders: list[tuple[str, LoadFunction, list[Path]]] = [
        ("60 % of the decode rate", sleeper(1 / (0.6 * decode)), paths[:64]),
        ("no time at all", sleeper(0), paths[:64]),
        ("tiny VAE on the cpu", load_encoder, paths[:8]),
    ]
    for name, load, some in contenders:
        theirs, ours = _both(
            lambda load=load, some=some: rival_rate(config, some, load),  # type: ignore[misc]
            lambda load=load, some=some: run(config, some, load)[0].images_per_s,  # type: ignore[misc]
            rounds,
        )
        lines.append(f"| {name} | {theirs:.1f} | {ours:.1f} | {ours / theirs:.2f} x |")
        print(lines[-1], flush=True)
        aims.append(Aim(f"against the loop: {name}", "shown", f"{ours / theirs:.2f} x", True))
    return "\n".join([*lines, "", LOOP, "", *aims_table(aims), "", machine(), ""])


def _both(theirs: Callable[[], float], ours: Callable[[], float], rounds: int) -> tuple[float, float]:
    """Medians of alternating runs."""
    rates = [(theirs(), ours()) for _ in range(rounds)]
    return statistics.median(rate[0] for rate in rates), statistics.median(rate[1] for rate in rates)


if __name__ == "__main__":
    main()
