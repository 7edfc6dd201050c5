"""Writing SDXL: single-file .safetensors in the original key layout, or a diffusers folder."""

from __future__ import annotations

import os
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Literal

import torch
from safetensors.torch import save_file
from torch import Tensor

from sdxl_core.errors import CheckpointError
from sdxl_core.files import disk_errors, sha256_file, sync_files, write_atomic
from sdxl_core.models.key_names import folder_names
from sdxl_core.models.load import SdxlModels, single_file_state
from sdxl_core.models.presets import MODEL_COMPONENTS
from sdxl_core.refs import FileRef

Precision = Literal["fp16", "bf16", "fp32"]
DTYPES: dict[Precision, torch.dtype] = {"fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32}


def modelspec_metadata(
    *, title: str, resolution: str = "1024x1024", prediction_type: str = "epsilon"
) -> dict[str, str]:
    """The modelspec fields that user interfaces read. Source: Stability AI's ModelSpec 1.0.1."""
    return {
        "modelspec.sai_model_spec": "1.0.1",
        "modelspec.architecture": "stable-diffusion-xl-v1-base",
        "modelspec.implementation": "https://github.com/Stability-AI/generative-models",
        "modelspec.title": title,
        "modelspec.resolution": resolution,
        "modelspec.prediction_type": prediction_type,
        "modelspec.date": datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%S"),
    }


def save_single_file(path: Path, models: SdxlModels, *, precision: Precision, metadata: Mapping[str, str]) -> FileRef:
    """Write a complete model as one .safetensors, whole or not at all.

    Raises: CheckpointError: a weight is not finite, or overflows in this precision.   DiskFullError.
    """
    dtype = DTYPES[precision]
    state = {key: _cast(key, tensor, dtype, precision) for key, tensor in single_file_state(models).items()}
    _save_atomic(path, state, {"format": "pt", **metadata})
    return FileRef(path=path, sha256=sha256_file(path), num_bytes=path.stat().st_size)


def save_diffusers_folder(path: Path, models: SdxlModels, *, precision: Precision) -> None:
    """Write every component as diffusers and transformers lay it out (config.json and safetensors).

    Raises: CheckpointError, DiskFullError.
    """
    for part in MODEL_COMPONENTS:
        module = getattr(models, part)
        state = {
            key: _cast(key, tensor, DTYPES[precision], precision)
            for key, tensor in folder_names(part, module.state_dict()).items()
        }
        stem = "model" if part.startswith("text_encoder") else "diffusion_pytorch_model"
        _save_atomic(path / part / f"{stem}.safetensors", state, {"format": "pt"})
        text = module.config.to_json_string() if part.startswith("text_encoder") else module.to_json_string()
        write_atomic(path / part / "config.json", text.encode())


def _cast(key: str, tensor: Tensor, dtype: torch.dtype, precision: str) -> Tensor:
    cast = tensor.detach().to("cpu", dtype).contiguous()
    if not torch.isfinite(cast).all():
        if torch.isfinite(tensor).all():
            advice = "It is too large for this precision: set save_precision = bf16 or fp32."
        else:
            advice = "Training has diverged: continue from an earlier state with a smaller learning rate."
        raise CheckpointError(f"{key} holds values that are not finite in {precision}; nothing was written. {advice}")
    return cast


def _save_atomic(path: Path, state: dict[str, Tensor], metadata: Mapping[str, str]) -> None:
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    with disk_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            save_file(state, partial, metadata=dict(metadata))
            sync_files([partial])
            os.replace(partial, path)
            sync_files([path])
        finally:
            partial.unlink(missing_ok=True)
