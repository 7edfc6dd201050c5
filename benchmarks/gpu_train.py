"""Training speed and memory on one card: our trainer's steps beside a plain loop as sd-scripts does it, in one run.

    python benchmarks/gpu_train.py [--out benchmarks/gpu_train.md] [--folder DIR]
    python benchmarks/gpu_train.py --preset tiny --device cpu --resolution-px 64 --steps 2 --quick --out /tmp/try.md

Needs no Prefect and no installed sdxl_core: numpy, torch, transformers, accelerate, safetensors, pyarrow, tensorboard;
and bitsandbytes, diffusers, instant-clip-tokenizer, isal, orjson, pydantic (wheels of constraints.txt will do).

Random weights of full size, latents of 1024 x 1024 px. Every case is a process of its own: peak memory is its own, and
one that does not fit is a row that says so. FLOPs are counted by torch (forward once, backward twice that, once more
where all activations are computed again); the card's matrix rate is measured in the same run.
"""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

CARD_GIB = 24
TEXTS = {"learning_rate_te1": 1e-6, "learning_rate_te2": 1e-6}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", choices=["sdxl", "tiny"], default="sdxl")
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--resolution-px", type=int, default=1024)
    parser.add_argument("--steps", type=int, default=10, help="timed steps a case, after two that are not")
    parser.add_argument("--quick", action="store_true", help="a few of the cases only")
    parser.add_argument("--only", nargs="+", metavar="TEXT", help="only cases with one of these texts in their name")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/gpu_train.md"))
    parser.add_argument("--folder", type=Path, help="for temporary files, 8 GB (default: the system's)")
    parser.add_argument("--case", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.case is not None:
        print(json.dumps(run_case(json.loads(options.case), options)))
        return
    from benchmarks.full_size import make_base

    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        options.folder = Path(folder)
        make_base(options.folder / "base.safetensors", options.preset)
        write_latents(options.folder, options.resolution_px)
        chosen = [case for case in cases(quick=options.quick) if _is_chosen(case["name"], options.only)]
        rows = [in_a_process(case, options) for case in chosen]
    write_result(options, rows)


def _is_chosen(name: str, only: list[str] | None) -> bool:
    return only is None or any(text in name for text in only)


def cases(*, quick: bool) -> list[dict[str, Any]]:
    """A case: its name, `plain` or TrainConfig's fields, and whether the card is capped."""
    plain = {"name": "plain loop, U-Net only, batch 1", "plain": True, "batch": 1}
    if quick:
        fused = {"fused_backward": True, "gradient_checkpointing": "all"}
        return [
            plain,
            {"name": "ours", "fields": fused},
            {"name": "24 GB preset", "fields": fused | TEXTS, "cap": True},
        ]
    found = [plain, plain | {"name": "plain loop, U-Net only, batch 4", "batch": 4}]
    for texts, mode, batch in itertools.product((False, True), ("none", "blocks", "all"), (1, 4, 8)):
        for fused, compiled in ((False, False), (True, False), (True, True)):
            name = f"{'both encoders' if texts else 'U-Net only'}, checkpointing {mode}, batch {batch}"
            name += (", fused" if fused else "") + (", compiled" if compiled else "")
            fields = {
                "gradient_checkpointing": mode, "train_batch_size": batch, "fused_backward": fused,
                "torch_compile": compiled, **(TEXTS if texts else {}),
            }  # fmt: skip
            found.append({"name": name, "fields": fields})
    capped = {"gradient_checkpointing": "all", "fused_backward": True, **TEXTS}
    return [*found, {"name": f"24 GB preset under a cap of {CARD_GIB} GiB", "fields": capped, "cap": True}]


def in_a_process(case: dict[str, Any], options: argparse.Namespace) -> dict[str, Any]:
    """Run a case; what went wrong becomes its row."""
    command = [
        sys.executable, __file__, "--case", json.dumps(case), "--preset", options.preset,
        "--device", options.device, "--resolution-px", str(options.resolution_px), "--steps", str(options.steps),
        "--folder", str(options.folder),
    ]  # fmt: skip
    ended = subprocess.run(command, capture_output=True, text=True, check=False)
    if ended.returncode:
        lines = [line for line in ended.stderr.splitlines() if line.strip()]
        return {"name": case["name"], "error": lines[-1][:200] if lines else f"exit status {ended.returncode}"}
    row: dict[str, Any] = {"name": case["name"], **json.loads(ended.stdout.splitlines()[-1])}
    print(row, flush=True)
    return row


def run_case(case: dict[str, Any], options: argparse.Namespace) -> dict[str, Any]:
    """Seconds a step (median), images/s, peak memory, TFLOP an image and the card's matrix rate."""
    import torch

    device = torch.device(options.device)
    if case.get("cap") and device.type == "cuda":
        total = torch.cuda.get_device_properties(device).total_memory
        torch.cuda.set_per_process_memory_fraction(min(1.0, CARD_GIB * 2**30 / total))
    rate = matrix_rate(device)
    step, batch, flops = plain_loop(case, options) if case.get("plain") else our_steps(case["fields"], options)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    seconds = []
    for number in range(options.steps + 2):
        start = time.perf_counter()
        step(number)
        if device.type == "cuda":
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - start)
    median = statistics.median(seconds[2:])
    peak = torch.cuda.max_memory_allocated() / 2**30 if device.type == "cuda" else 0.0
    return {
        "images_per_s": batch / median, "seconds": median, "peak_gib": peak, "tflop": flops / 1e12,
        "rate": rate / 1e12, "share": flops * batch / median / rate,
    }  # fmt: skip


def matrix_rate(device: Any) -> float:
    """FLOP/s of large bf16 matrix products."""
    import torch

    side = 8192 if device.type == "cuda" else 512
    one, other = (torch.randn(side, side, device=device, dtype=torch.bfloat16) for _ in range(2))
    for count in (2, 10):
        start = time.perf_counter()
        for _ in range(count):
            product = one @ other
        product[0, 0].item()
    return 2 * side**3 * count / (time.perf_counter() - start)


def our_steps(fields: dict[str, Any], options: argparse.Namespace) -> Any:
    """The trainer's own step on its own data."""
    from sdxl_core.config import TrainConfig
    from sdxl_core.training import loop
    from sdxl_core.training.training_set import read_training_set

    folder = options.folder
    config = TrainConfig(
        base_model=str(folder / "base.safetensors"), metadata=folder / "meta_lat.json", latents=folder / "latents",
        out=folder / "run", max_train_steps=options.steps + 3, learning_rate=1e-5, num_processes=1,
        use_cpu=options.device == "cpu", **fields,
    )  # fmt: skip
    training_set = read_training_set(config)
    run = loop.Run(config, loop.make_accelerator(config), training_set, training_set.plan(config))
    feed = run.batches.steps(0, run.total)

    class Never:
        received = False

    def step(number: int) -> None:
        result = run.stepper.step(number, next(feed), Never())  # type: ignore[arg-type]
        assert not result.fault, result.fault

    again = 4 if config.gradient_checkpointing == "all" else 3
    return step, config.train_batch_size, again * forward_flops(run.denoiser, options)


def plain_loop(case: dict[str, Any], options: argparse.Namespace) -> Any:
    """As sd-scripts' sdxl_train.py with --full_bf16 --use_8bit_adam --gradient_checkpointing: its steps, its order."""
    import bitsandbytes
    import torch

    from sdxl_core.models import load_models, tokenize
    from sdxl_core.training.denoiser import Denoiser
    from sdxl_core.training.objectives.schedule import alphas_cumprod

    device, batch = torch.device(options.device), case["batch"]
    models = load_models(str(options.folder / "base.safetensors"), dtype=torch.bfloat16)
    parts = {part: getattr(models, part).to(device) for part in ("unet", "text_encoder", "text_encoder_2")}
    parts["text_encoder"].requires_grad_(False)
    parts["text_encoder_2"].requires_grad_(False)
    unet = parts["unet"].train()
    unet.enable_gradient_checkpointing()
    denoiser = Denoiser(**parts)
    optimizer = bitsandbytes.optim.AdamW8bit(unet.parameters(), lr=1e-5)
    alphas = alphas_cumprod().to(device)
    tokens = tokenize(["a boat, the sea"] * batch, max_token_length=75)
    side = options.resolution_px // 8
    ids = torch.full((batch, 6), float(options.resolution_px), device=device)

    def step(number: int) -> None:
        latents = torch.randn(batch, 4, side, side, device=device) * 0.9
        noise, timesteps = torch.randn_like(latents), torch.randint(0, 1000, (batch,), device=device)
        alpha = alphas[timesteps].view(-1, 1, 1, 1)
        noisy = alpha.sqrt() * latents + (1 - alpha).sqrt() * noise
        with torch.autocast(device.type, torch.bfloat16):
            predicted = denoiser(noisy, timesteps, tokens.clip_l.to(device), tokens.clip_g.to(device), ids)
        loss = torch.nn.functional.mse_loss(predicted.float(), noise.float())
        loss.backward()
        torch.nn.utils.clip_grad_norm_(unet.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        loss.item()

    return step, batch, 4 * forward_flops(denoiser, options)


def forward_flops(denoiser: Any, options: argparse.Namespace) -> int:
    """Of one image, counted without computing it: the U-Net on meta tensors (the encoders are less than 2 %)."""
    import torch
    from torch.utils.flop_counter import FlopCounterMode

    from sdxl_core.models.load import meta_module

    unet, side = meta_module("unet", options.preset), options.resolution_px // 8
    config = unet.config
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        unet(
            torch.empty(1, 4, side, side, device="meta"),
            torch.empty(1, device="meta"),
            encoder_hidden_states=torch.empty(1, 77, config.cross_attention_dim, device="meta"),
            added_cond_kwargs={
                "text_embeds": torch.empty(1, denoiser.text_encoder_2.config.projection_dim, device="meta"),
                "time_ids": torch.empty(1, 6, device="meta"),
            },
        )
    return counter.get_total_flops()


def write_latents(folder: Path, resolution_px: int) -> None:
    """128 pictures of one bucket, as a latent cache has them."""
    (folder / "latents").mkdir()
    rng, side, entries = np.random.default_rng(0), resolution_px // 8, {}
    for number in range(128):
        np.savez(
            folder / "latents" / f"{number:03d}.npz",
            latents=(7.0 * rng.standard_normal((4, side, side))).astype(np.float32),
            original_size=np.array([resolution_px, resolution_px]),
            crop_ltrb=np.array([0.0, 0.0, resolution_px, resolution_px]),
        )
        entries[f"{number:03d}"] = {"tags": "a boat, the sea", "train_resolution": [resolution_px, resolution_px]}
    (folder / "meta_lat.json").write_text(json.dumps(entries))


def write_result(options: argparse.Namespace, rows: list[dict[str, Any]]) -> None:
    import bitsandbytes
    import torch

    card = torch.cuda.get_device_name() if options.device == "cuda" else "CPU"
    baseline = next((row.get("images_per_s") for row in rows if row["name"].startswith("plain")), None)
    lines = [
        "# Training on one card",
        "",
        f"`python benchmarks/gpu_train.py` ({time.strftime('%Y-%m-%d')}): preset {options.preset}, "
        f"{options.resolution_px} px, medians of {options.steps} steps. {card}, torch {torch.__version__}, "
        f"bitsandbytes {bitsandbytes.__version__}.",
        "",
        "| case | images/s | x plain loop | seconds a step | peak GiB | share of the matrix rate |",
        "|---|---|---|---|---|---|",
    ]
    for row in rows:
        if "error" in row:
            lines.append(f"| {row['name']} | {row['error']} | | | | |")
            continue
        ratio = f"{row['images_per_s'] / baseline:.2f}" if baseline else ""
        lines.append(
            f"| {row['name']} | {row['images_per_s']:.2f} | {ratio} | {row['seconds']:.3f} | {row['peak_gib']:.1f} | "
            f"{row['share']:.0%} |"
        )
    rates = [row["rate"] for row in rows if "rate" in row]
    if rates:
        lines += ["", f"Matrix rate measured here: {statistics.median(rates):.1f} TFLOP/s (bf16 products)."]
    text = "\n".join([*lines, ""])
    print(text)
    options.out.write_text(text)


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parents[1]))  # wherever it is started
    main()
