"""Which parts of SDXL train at which rate, in which dtype, and how they become a checkpoint again."""

from __future__ import annotations

import fnmatch
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from sdxl_core.config import TrainConfig, TrainOptions
from sdxl_core.errors import CheckpointError, ConfigError
from sdxl_core.lineage import lineage_metadata
from sdxl_core.models import (
    Prediction,
    load_models,
    modelspec_metadata,
    save_diffusers_folder,
    save_single_file,
)
from sdxl_core.models.presets import Preset
from sdxl_core.refs import FileRef
from sdxl_core.training.denoiser import Denoiser
from sdxl_core.training.optimizer import ParameterGroup
from sdxl_core.training.parallel import Piece
from sdxl_core.training.rates import PARTS, freeze_blocks, learning_rates, parameter_groups
from sdxl_core.training.reshard import gather_piece
from sdxl_core.training.state import Generation


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainedModels:
    """The models of a run on its device. `groups`: what trains, one a trained part; `preset`: "sdxl" or "tiny"."""

    denoiser: Denoiser
    groups: tuple[ParameterGroup, ...]
    preset: Any

    def regrouped(self) -> TrainedModels:
        """The same after FSDP2 has replaced the modules' parameters by divided ones."""
        current = {
            f"{PARTS[part]}.{name}": parameter
            for part in PARTS
            for name, parameter in getattr(self.denoiser, part).named_parameters()
        }
        groups = (replace(group, parameters=tuple(current[name] for name in group.names)) for group in self.groups)
        return replace(self, groups=tuple(groups))


def model_path(config: TrainConfig) -> Path:
    """Where the trained model goes."""
    return config.out / "model" / f"{config.output_name}.safetensors"


def load_trained_models(config: TrainConfig, *, device: torch.device) -> TrainedModels:
    """Load U-Net and text encoders: trained ones in `weights_dtype`, frozen ones in the dtype of the forward pass.

    Raises: ConfigError, CheckpointError: `base_model` cannot be loaded.
    """
    rates = learning_rates(config)
    half = config.weights_dtype == "bfloat16" or config.mixed_precision == "bf16"
    dtypes = {
        part: getattr(torch, config.weights_dtype) if rate else (torch.bfloat16 if half else torch.float32)
        for part, rate in rates.items()
    }
    modules: dict[str, Any] = {}
    for dtype in set(dtypes.values()):
        wanted = tuple(part for part in PARTS if dtypes[part] == dtype)
        models = load_models(config.base_model, parts=wanted, dtype=dtype)
        outside = wanted if config.cache_text_encoder_outputs else ()
        modules |= {
            part: getattr(models, part).to("cpu" if part in outside and part != "unet" else device) for part in wanted
        }
    choose_trained(modules, config, models.preset)
    checkpoint_activations(modules, config)
    groups = parameter_groups(modules, config, models.preset)
    return TrainedModels(
        denoiser=Denoiser(**modules, holds_texts=not config.cache_text_encoder_outputs),
        groups=groups,
        preset=models.preset,
    )


def choose_trained(modules: Mapping[str, Any], config: TrainOptions, preset: Preset) -> None:
    """Give gradients to what trains, and to nothing else: parts and blocks with a rate, less what `freeze` names.

    Raises: ConfigError: a pattern that fits no weight, or nothing is left to train.
    """
    rates = learning_rates(config)
    for part, module in modules.items():
        module.requires_grad_(bool(rates[part])).train(bool(rates[part]))
    freeze_blocks(modules["unet"], config, preset)
    _freeze_unused(modules["text_encoder"])
    named = {f"{PARTS[part]}.{name}": p for part, module in modules.items() for name, p in module.named_parameters()}
    for pattern in config.freeze:
        found = fnmatch.filter(named, pattern)
        if not found:
            raise ConfigError(
                f"freeze: no weight is named like {pattern!r}. Names are diffusers' with the part in front, such as "
                f"unet.down_blocks.1.attentions.0.proj_in.weight; * stands for any characters."
            )
        for name in found:
            named[name].requires_grad_(False)
    if not any(parameter.requires_grad for parameter in named.values()):
        raise ConfigError("freeze: these patterns leave nothing to train. Take some of them out.")


def checkpoint_activations(modules: Mapping[str, Any], config: TrainConfig) -> None:
    """Switch on what `gradient_checkpointing` says: diffusers' switch for each block, transformers' for an encoder."""
    mode, rates = config.gradient_checkpointing, learning_rates(config)
    if mode == "none":
        return
    unet = modules["unet"]
    unet.enable_gradient_checkpointing(_compute_again)
    if mode == "blocks":
        for module in unet.modules():
            if hasattr(module, "gradient_checkpointing") and type(module).__name__ != "Transformer2DModel":
                module.gradient_checkpointing = False
        return
    for part in ("text_encoder", "text_encoder_2"):
        if rates[part]:
            _checkpoint_activations(modules[part])


def _compute_again(module: Any, *inputs: Any) -> Any:
    """Nothing in SDXL's forward pass is random, so torch's seed, which other threads share, is left alone."""
    return checkpoint(module.__call__, *inputs, use_reentrant=False, preserve_rng_state=False)


def _checkpoint_activations(text_encoder: Any) -> None:
    """transformers renamed the switch within release 5."""
    enable = getattr(text_encoder, "activation_checkpointing_enable", None)
    (enable or text_encoder.gradient_checkpointing_enable)({"use_reentrant": False, "preserve_rng_state": False})


def _freeze_unused(text_encoder: nn.Module) -> None:
    """SDXL reads CLIP-L before its last layer; that layer and the final norm never get a gradient."""
    encoder: Any = text_encoder
    encoder = getattr(encoder, "text_model", encoder)
    encoder.encoder.layers[-1].requires_grad_(False)
    encoder.final_layer_norm.requires_grad_(False)


def save_checkpoint(
    generation: Generation,
    *,
    path: Path,
    config: TrainConfig | None = None,
    weights: Literal["weights", "ema"] = "weights",
) -> FileRef:
    """Write a saved state as a model: what trained as trained, all else exactly as in the base model.

    Args:   path: of the single file; a diffusers folder (`save_model_as`) has its name without .safetensors.
            config: of the run, left out: as the state has it.   weights: "ema": the averaged ones.
    Raises: CheckpointError: the state has no such weights.   DiskFullError, DataError.
    """
    config = config or TrainConfig.model_validate(generation.run["config"])
    if weights not in generation.tensors:
        raise CheckpointError(f"{generation.path}: holds no averaged weights; the run had no ema_decay.")
    rates = learning_rates(config)
    models = load_models(config.base_model, dtype=None)
    for part in (part for part in PARTS if rates[part]):
        for key, parameter in getattr(models, part).named_parameters():
            name = f"{PARTS[part]}.{key}"
            if any(name in saved.tensors[weights] for saved in generation.parts):
                whole = Piece(offset=0, count=parameter.numel(), total=parameter.numel())
                parameter.data = gather_piece(generation, weights, name, whole).view(parameter.shape)
    resolution = generation.run.get("resolution", "1024x1024")  # not in states of version 0.1
    metadata = modelspec_metadata(title=config.output_name, resolution=resolution) | {
        "sdxl_flows.config": config.model_dump_json(),
        "sdxl_flows.dataset_digest": generation.run["dataset_digest"],
        "sdxl_flows.steps": str(generation.step),
        **lineage_metadata(config, metadata_sha256=generation.run["metadata_sha256"]),
        **{f"modelspec.{name}": text for name, text in config.modelspec.items()},
    }
    if weights == "ema":
        metadata["sdxl_flows.weights"] = "ema"
    prediction = Prediction(config.prediction_type, config.zero_terminal_snr)
    whole_model = replace(models, prediction=prediction)
    if config.save_model_as == "diffusers":
        folder = path.with_name(path.name.removesuffix(".safetensors"))
        return save_diffusers_folder(folder, whole_model, precision=config.save_precision, metadata=metadata)
    return save_single_file(path, whole_model, precision=config.save_precision, metadata=metadata)
