"""`sdxl-flows doctor`: what is installed, which GPUs, does bitsandbytes work here, and what to do if not."""

from __future__ import annotations

import contextlib
import importlib.metadata
import importlib.util
import io
import logging
import platform
import shutil
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

REQUIRED = ("torch", "accelerate", "diffusers", "transformers", "safetensors", "bitsandbytes", "pillow",
            "opencv-python-headless", "numpy", "orjson", "pydantic", "pyarrow", "tensorboard", "tqdm",
            "instant-clip-tokenizer", "isal", "pyspng")  # fmt: skip


@dataclass(frozen=True, slots=True, kw_only=True)
class Finding:
    """One line of the report. `advice`: what to do, "" where nothing is to be done."""

    name: str
    state: Literal["ok", "note", "bad"]
    text: str
    advice: str = ""


def run_doctor(*, as_json: bool) -> int:
    """Print every finding. Returns the exit status: 0 when nothing is bad, else 1."""
    findings = examine()
    if as_json:
        import orjson

        print(orjson.dumps([asdict(finding) for finding in findings], option=orjson.OPT_INDENT_2).decode())
    else:
        for finding in findings:
            print(f"{finding.state:<5} {finding.name:<24} {finding.text}")
            if finding.advice:
                print(f"{'':<31}-> {finding.advice}")
        bad = sum(finding.state == "bad" for finding in findings)
        print(f"\n{bad} problem{'s' if bad != 1 else ''} found." if bad else "\nEverything needed is here.")
    return 1 if any(finding.state == "bad" for finding in findings) else 0


def examine() -> list[Finding]:
    """Every finding, in the order a person fixes things: platform, packages, devices, optimizer, disk."""
    checks: list[Callable[[], list[Finding]]] = [
        _platform,
        _packages,
        _prefect,
        _torch,
        _bitsandbytes,
        _tokenizer,
        _disk,
    ]
    return [finding for check in checks for finding in check()]


def _platform() -> list[Finding]:
    system, release = platform.system(), platform.release()
    python = Finding(name="Python", state="ok", text=platform.python_version())
    if system == "Linux":
        text = f"Linux {release}" + (" (WSL2)" if "microsoft" in release.lower() else "")
        return [Finding(name="system", state="ok", text=text), python]
    advice = "use WSL2: `wsl --install` in PowerShell, then follow the README inside it; reading metadata works here"
    return [Finding(name="system", state="bad", text=f"{system} {release} is not supported", advice=advice), python]


def _packages() -> list[Finding]:
    findings = []
    for name in REQUIRED:
        try:
            findings.append(Finding(name=name, state="ok", text=importlib.metadata.version(name)))
        except importlib.metadata.PackageNotFoundError:
            findings.append(Finding(name=name, state="bad", text="not installed", advice=f"pip install {name}"))
    return findings


def _prefect() -> list[Finding]:
    try:
        prefect = importlib.metadata.version("prefect")
    except importlib.metadata.PackageNotFoundError:
        text = "not installed: stage commands work, flows (demo, run, --flow) do not"
        return [
            Finding(name="prefect", state="note", text=text, advice="pip install 'prefect>=3.8.8,<4' 'fastapi<0.151'")
        ]
    findings = [Finding(name="prefect", state="ok", text=prefect)]
    with contextlib.suppress(importlib.metadata.PackageNotFoundError):
        fastapi = importlib.metadata.version("fastapi")
        if tuple(int(part) for part in fastapi.split(".")[:2]) >= (0, 151):
            findings.append(Finding(name="fastapi", state="bad", text=f"{fastapi}: too new for Prefect's server",
                                    advice="pip install 'fastapi>=0.139,<0.151'"))  # fmt: skip
    return findings


def _torch() -> list[Finding]:
    if importlib.util.find_spec("torch") is None:
        return []
    import torch

    if not torch.cuda.is_available():
        text = f"no CUDA card that PyTorch {torch.__version__} can use"
        advice = "fine for the demo; training needs a card, its driver and a CUDA build of PyTorch"
        return [Finding(name="GPU", state="note", text=text, advice=advice)]
    findings = []
    for index in range(torch.cuda.device_count()):
        card = torch.cuda.get_device_properties(index)
        gib = card.total_memory / 2**30
        bf16 = "bf16" if card.major >= 8 else "no bf16: set latents.dtype = float32 and train.mixed_precision = no"
        state: Literal["ok", "note"] = "ok" if card.major >= 8 and gib > 22 else "note"
        findings.append(Finding(name=f"GPU {index}", state=state, text=f"{card.name}, {gib:.1f} GiB, {bf16}"))
    return findings


def _bitsandbytes() -> list[Finding]:
    """One real AdamW8bit step on every kind of device there is, compared with what it must do: move the weights."""
    if importlib.util.find_spec("bitsandbytes") is None or importlib.util.find_spec("torch") is None:
        return []
    import torch

    devices = ["cpu"] + (["cuda"] if torch.cuda.is_available() else [])
    return [_step_once(device) for device in devices]


def _step_once(device: str) -> Finding:
    import torch

    name = f"AdamW8bit on {device}"
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    try:
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            import bitsandbytes

            weight = torch.nn.Parameter(torch.ones(4096, device=device))
            optimizer = bitsandbytes.optim.AdamW8bit([weight], lr=0.01, weight_decay=0.0)
            weight.grad = torch.ones_like(weight)
            optimizer.step()
    except (RuntimeError, OSError, ImportError, AttributeError, NotImplementedError) as error:
        advice = "pip install -U bitsandbytes, or set train.optimizer = adamw (needs 6 bytes more a weight)"
        return Finding(name=name, state="bad", text=f"does not work: {error}", advice=advice)
    moved = float((1 - weight.detach()).mean())
    if abs(moved - 0.01) > 0.001:
        return Finding(name=name, state="bad", text=f"one step moved a weight by {moved:.4f} instead of 0.0100",
                       advice="set train.optimizer = adamw, and report the versions above")  # fmt: skip
    return Finding(name=name, state="ok", text="one step computed and checked")


def _tokenizer() -> list[Finding]:
    if importlib.util.find_spec("instant_clip_tokenizer") is None:
        return []
    from sdxl_core.models.tokenizer import count_tokens

    return [
        Finding(
            name="CLIP tokenizer", state="ok", text=f'"1girl, long hair" is {count_tokens("1girl, long hair")} tokens'
        )
    ]


def _disk() -> list[Finding]:
    free_gb = shutil.disk_usage(Path.cwd()).free / 1e9
    text = f"{free_gb:.0f} GB free in {Path.cwd()}"
    if free_gb < 30:
        advice = "an SDXL checkpoint with its training state takes about 30 GB; choose an out folder on a larger disk"
        return [Finding(name="disk", state="note", text=text, advice=advice)]
    return [Finding(name="disk", state="ok", text=text)]
