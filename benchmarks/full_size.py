"""SDXL at its full size on a CPU: load, one complete training step, save, load again, in how much memory and time.

    python benchmarks/full_size.py --out benchmarks/full_size.md [--folder DIR]      (make bench-full-size)

Random weights in bf16 are written as a single file first (a process of its own), then the trainer's own classes load
it and do one step at 256 x 256 with all of the U-Net and both text encoders: AdamW8bit, stochastic rounding, each
weight updated within the backward pass. DIR needs 15 GB for a few minutes.
"""

from __future__ import annotations

import argparse
import gc
import os
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import orjson

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
LIMIT_GIB = 18.0
PARTS = ("unet", "text_encoder", "text_encoder_2")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/full_size.md"))
    parser.add_argument("--folder", type=Path, help="for temporary files (default: the system's)")
    parser.add_argument("--preset", choices=["sdxl", "tiny"], default="sdxl", help="tiny: to try this script")
    parser.add_argument("--make", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.make is not None:
        make_base(options.make, options.preset)
        return
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        write_result(options.out, measure(Path(folder), options.preset), options.preset)


def make_base(path: Path, preset: str) -> None:
    """A single file of random weights: normal of std 0.02, norms 1, biases 0."""
    import torch

    from sdxl_core.models import SdxlModels, modelspec_metadata, save_single_file
    from sdxl_core.models.load import meta_module

    modules = {}
    for number, part in enumerate((*PARTS, "vae")):
        module = meta_module(part, preset).to(torch.bfloat16).to_empty(device="cpu")
        generator = torch.Generator().manual_seed(number)
        for parameter in module.parameters():
            if parameter.dim() > 1:
                parameter.data.normal_(0.0, 0.02, generator=generator)
        for name, parameter in module.named_parameters():
            if parameter.dim() == 1:
                parameter.data.fill_(1.0 if name.endswith("weight") else 0.0)
        modules[part] = module
    models = SdxlModels(preset=preset, **modules, logit_scale=torch.tensor(4.6052))
    save_single_file(path, models, precision="bf16", metadata=modelspec_metadata(title="random weights"))


def measure(folder: Path, preset: str) -> dict[str, object]:
    """Everything after the base model is there. Peaks are of this process: private and mapped pages together."""
    base = folder / "base.safetensors"
    subprocess.run([sys.executable, __file__, "--make", base, "--preset", preset], check=True)
    import torch

    from sdxl_core.config import TrainConfig
    from sdxl_core.models import SdxlModels, load_models, modelspec_metadata, save_single_file
    from sdxl_core.models.weights import WeightFile
    from sdxl_core.training.loop import Run, make_accelerator
    from sdxl_core.training.training_set import read_training_set

    rss = {"imports": peak_gib()}
    metadata, latents = write_latents(folder)
    config = TrainConfig(
        base_model=str(base), metadata=metadata, latents=latents, out=folder / "run", max_train_steps=1,
        learning_rate=1e-5, learning_rate_te1=1e-5, learning_rate_te2=1e-5, optimizer="adamw8bit",
        weights_dtype="bfloat16", fused_backward=True, gradient_checkpointing="all", use_cpu=True, num_processes=1,
    )  # fmt: skip
    seconds = {}
    start = time.perf_counter()
    training_set = read_training_set(config)
    run = Run(config, make_accelerator(config), training_set, training_set.plan(config))
    seconds["load"] = time.perf_counter() - start
    rss["loaded"] = peak_gib()
    numel = {group.name: sum(p.numel() for p in group.parameters) for group in run.models.groups}

    class Never:
        received = False

    start = time.perf_counter()
    result = run.stepper.step(0, next(run.batches.steps(0, 1)), Never())
    seconds["step"] = time.perf_counter() - start
    rss["one step"] = peak_gib()
    assert not result.fault, result.fault
    eight_bit = sum(state["state1"].dtype == torch.uint8 for state in run.updater.optimizer.states.values())

    start = time.perf_counter()
    denoiser = run.denoiser
    kept = load_models(str(base), parts=("vae",), dtype=torch.bfloat16)
    parts = {part: getattr(denoiser, part) for part in PARTS}
    models = SdxlModels(preset=preset, vae=kept.vae, logit_scale=kept.logit_scale, **parts)
    file = save_single_file(
        folder / "trained.safetensors", models, precision="bf16", metadata=modelspec_metadata(title="one step")
    )
    seconds["save"] = time.perf_counter() - start
    rss["saved"] = peak_gib()
    del run, models, parts, denoiser, kept
    gc.collect()

    before, after = WeightFile(base), WeightFile(file.path)
    assert dict(before.shapes) == dict(after.shapes), "keys or shapes differ"
    start = time.perf_counter()
    loaded = load_models(str(file.path), dtype=torch.bfloat16)
    seconds["load again"] = time.perf_counter() - start
    moved = sum(not torch.equal(before[key], after[key]) for key in after)
    del loaded
    return {
        "keys": len(after.shapes), "moved": moved, "numel": numel, "eight_bit": eight_bit, "loss": result.gathered.loss,
        "grad_norm": result.grad_norm, "update_share": result.update_share, "seconds": seconds, "rss": rss,
        "file_bytes": file.num_bytes,
    }  # fmt: skip


def write_latents(folder: Path) -> tuple[Path, Path]:
    """One picture of 256 x 256, as a latent cache has it."""
    latents = folder / "latents"
    latents.mkdir()
    rng = np.random.default_rng(0)
    np.savez(
        latents / "one.npz",
        latents=(7.0 * rng.standard_normal((4, 32, 32))).astype(np.float32),
        original_size=np.array([256, 256]),
        crop_ltrb=np.array([0.0, 0.0, 256.0, 256.0]),
    )
    entry = {"one": {"tags": "a boat, the sea", "train_resolution": [256, 256]}}
    (folder / "meta_lat.json").write_bytes(orjson.dumps(entry))
    return folder / "meta_lat.json", latents


def peak_gib() -> float:
    """The most resident memory this process has had, mapped files included."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (1 << 20)


def write_result(path: Path, found: dict, preset: str) -> None:
    import bitsandbytes
    import torch
    from measure import machine

    rss, seconds = found["rss"], found["seconds"]
    verdict = "within" if rss["one step"] <= LIMIT_GIB else "OVER"
    lines = [
        "# SDXL at full size on a CPU: one complete training step",
        "",
        f"`make bench-full-size` ({time.strftime('%Y-%m-%d')}, preset {preset}). {machine()}, "
        f"torch {torch.__version__}, bitsandbytes {bitsandbytes.__version__}, {torch.get_num_threads()} threads; "
        "no GPU.",
        "",
        "Random weights in bf16, loaded from a single file by the trainer; one step at 256 x 256, batch 1, of all of "
        "the U-Net and both text encoders: AdamW8bit, stochastic rounding, each weight updated within the backward "
        "pass, activations computed again. Peaks count mapped files too.",
        "",
        "| after | peak RSS of the process so far | seconds |",
        "|---|---|---|",
        f"| imports | {rss['imports']:.2f} GiB | |",
        f"| load | {rss['loaded']:.2f} GiB | {seconds['load']:.0f} |",
        f"| one step | **{rss['one step']:.2f} GiB** ({verdict} {LIMIT_GIB:.0f}) | {seconds['step']:.0f} |",
        f"| save as single file | {rss['saved']:.2f} GiB | {seconds['save']:.0f} |",
        f"| load that file again | | {seconds['load again']:.0f} |",
        "",
        "* trained elements: " + ", ".join(f"{name} {count:,}" for name, count in found["numel"].items()),
        f"* weights with 8-bit states: {found['eight_bit']:,}; share of the update that reached the weights: "
        f"{found['update_share']:.3f}; loss {found['loss']:.4f}, gradient norm {found['grad_norm']:.3g}",
        f"* the saved file ({found['file_bytes'] / 1e9:.2f} GB) has the base model's {found['keys']:,} keys and "
        f"shapes; {found['moved']:,} tensors moved",
        "",
    ]
    text = "\n".join(lines)
    print(text)
    path.write_text(text)


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parent))
    main()
