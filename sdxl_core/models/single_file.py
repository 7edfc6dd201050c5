"""Writing SDXL: one .safetensors file in the original key layout, or a diffusers folder. Streamed, tensor by tensor."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from datetime import UTC, datetime
from itertools import chain
from pathlib import Path
from typing import Any, Literal

import orjson
import torch
from torch import Tensor

from sdxl_core.errors import CheckpointError, ConfigError
from sdxl_core.files import atomic_writer, digest_of, write_atomic
from sdxl_core.models.key_names import LOGIT_SCALE, folder_names, to_original
from sdxl_core.models.load import SdxlModels
from sdxl_core.models.pipeline_files import write_pipeline_files
from sdxl_core.models.prediction import EPSILON
from sdxl_core.models.presets import MODEL_COMPONENTS, component_config
from sdxl_core.models.weights import raw_bytes
from sdxl_core.refs import FileRef

Precision = Literal["fp16", "bf16", "fp32"]
DTYPES: dict[Precision, torch.dtype] = {"fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32}
_FORMAT_NAMES: dict[Precision, str] = {"fp16": "F16", "bf16": "BF16", "fp32": "F32"}
FORMAT = {"format": "pt"}
METADATA_FILE = "sdxl_flows.json"  # a diffusers folder has no place for metadata of its own


def modelspec_metadata(
    *,
    title: str,
    resolution: str = "1024x1024",
    date: datetime | None = None,
) -> dict[str, str]:
    """The metadata that user interfaces read. Source: Stability AI's ModelSpec 1.0.1.

    Args:   resolution: "WIDTHxHEIGHT" in pixels.   date: when the model was made, with a time zone; left out: now.
    """
    return {
        "modelspec.sai_model_spec": "1.0.1",
        "modelspec.architecture": "stable-diffusion-xl-v1-base",
        "modelspec.implementation": "https://github.com/Stability-AI/generative-models",
        "modelspec.title": title,
        "modelspec.resolution": resolution,
        **EPSILON.modelspec(),
        "modelspec.date": (date or datetime.now(UTC)).astimezone(UTC).strftime("%Y-%m-%dT%H:%M:%S"),
    }


def save_single_file(path: Path, models: SdxlModels, *, precision: Precision, metadata: Mapping[str, str]) -> FileRef:
    """Write a complete model as one .safetensors in the original key layout, whole or not at all.

    Args:   models: all four parts, on any device and in any floating dtype.   precision: of every tensor in the file.
            metadata: of the file; what the model predicts is added where it is not the noise.
    Raises: ConfigError: a part is missing.   CheckpointError: a weight is not finite, or too large for this precision
            (nothing is written).   DiskFullError.   DataError: no permission.
    """
    state: dict[str, Tensor] = {}
    for part in MODEL_COMPONENTS:
        module = getattr(models, part)
        if module is None:
            raise ConfigError(f"{path}: a checkpoint holds all of {', '.join(MODEL_COMPONENTS)}; {part} is not loaded.")
        state |= to_original(part, folder_names(part, module.state_dict()), models.preset)
    if models.logit_scale is not None:
        state[LOGIT_SCALE] = models.logit_scale
    state |= models.prediction.marker_keys()
    said = {} if models.prediction == EPSILON else models.prediction.modelspec()
    return _write_safetensors(path, state, precision, FORMAT | dict(metadata) | said)


def save_diffusers_folder(
    path: Path, models: SdxlModels, *, precision: Precision, metadata: Mapping[str, str] | None = None
) -> FileRef:
    """Write every loaded part, scheduler, tokenizers and index: what `from_pretrained` of an SDXL pipeline reads.

    Each file is whole or not there; `metadata` is kept in a file of its own, written last.
    Returns: the folder, the bytes of its weights, and a digest over them. Raises: as `save_single_file`.
    """
    weights = []
    for part in MODEL_COMPONENTS:
        module = getattr(models, part)
        if module is None:
            continue
        from_transformers = part.startswith("text_encoder")
        name = "model.safetensors" if from_transformers else "diffusion_pytorch_model.safetensors"
        state = folder_names(part, module.state_dict())
        weights.append(_write_safetensors(path / part / name, state, precision, FORMAT))
        config = module.config.to_json_string(use_diff=False) if from_transformers else module.to_json_string()
        write_atomic(path / part / "config.json", config.encode())
    config = component_config(models.preset, "scheduler") | models.prediction.scheduler_config()
    scheduler = orjson.dumps(config, option=orjson.OPT_INDENT_2)
    write_atomic(path / "scheduler" / "scheduler_config.json", scheduler)
    write_pipeline_files(path, scheduler_class=config["_class_name"])
    write_atomic(path / METADATA_FILE, orjson.dumps(dict(metadata or {}), option=orjson.OPT_INDENT_2))
    digest = digest_of(*(ref.sha256 for ref in weights))
    return FileRef(path=path, sha256=digest, num_bytes=sum(ref.num_bytes for ref in weights))


def _write_safetensors(
    path: Path, state: Mapping[str, Tensor], precision: Precision, metadata: Mapping[str, str]
) -> FileRef:
    """Header, then one tensor after the other, hashed on the way. Source: the safetensors format's README."""
    header: dict[str, Any] = {"__metadata__": dict(metadata)}
    end = 0
    for key, tensor in state.items():
        start, end = end, end + tensor.numel() * DTYPES[precision].itemsize
        header[key] = {
            "dtype": _FORMAT_NAMES[precision],
            "shape": list(tensor.shape),
            "data_offsets": [start, end],
        }
    text = orjson.dumps(header)
    text += b" " * (-len(text) % 8)
    pieces: Iterator[Any] = (raw_bytes(_cast(path, key, tensor, precision)) for key, tensor in state.items())
    digest, num_bytes = hashlib.sha256(), 0
    with atomic_writer(path) as file:
        for piece in chain((len(text).to_bytes(8, "little"), text), pieces):
            file.write(piece)
            digest.update(piece)
            num_bytes += len(piece)
    return FileRef(path=path, sha256=digest.hexdigest(), num_bytes=num_bytes)


def _cast(path: Path, key: str, tensor: Tensor, precision: Precision) -> Tensor:
    cast = tensor.detach().to(DTYPES[precision])
    if cast.numel() and not all(
        extreme.isfinite() for extreme in torch.aminmax(cast)
    ):  # NaN is passed on; 16 times isfinite's speed
        if torch.isfinite(tensor).all():
            advice = f"It is too large for {precision}: save in bf16 or fp32."
        else:
            advice = "Training has diverged: continue from an earlier state with a smaller learning rate."
        raise CheckpointError(f"{path}: not written, because {key} holds values that are not finite. {advice}")
    return cast.cpu()
