"""Which parts of SDXL train at which rate, in which dtype, and how they become a checkpoint again."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from sdxl_core.config import TrainConfig
from sdxl_core.errors import CheckpointError
from sdxl_core.lineage import lineage_metadata
from sdxl_core.models import Prediction, SdxlModels, load_models, modelspec_metadata, save_single_file
from sdxl_core.refs import FileRef
from sdxl_core.training.denoiser import Denoiser
from sdxl_core.training.optimizer import ParameterGroup
from sdxl_core.training.rates import PARTS, freeze_blocks, learning_rates, parameter_groups


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainedModels:
    """The models of a run on its device. `groups`: what trains, one a trained part; `preset`: "sdxl" or "tiny"."""

    denoiser: Denoiser
    groups: tuple[ParameterGroup, ...]
    preset: Any

    def trained_tensors(self) -> dict[str, Tensor]:
        """The trained parameters by name, in the dtype they are trained in."""
        return {
            name: parameter.detach()
            for group in self.groups
            for name, parameter in zip(group.names, group.parameters, strict=True)
        }

    def load_trained_tensors(self, tensors: dict[str, Tensor]) -> None:
        """Put saved parameters in place. Raises: CheckpointError: other names or shapes than are trained here."""
        parameters = self.trained_tensors()
        if {name: value.shape for name, value in parameters.items()} != {k: v.shape for k, v in tensors.items()}:
            raise CheckpointError(
                "the saved weights are of another model than base_model. Train into another out folder."
            )
        for name, parameter in parameters.items():
            parameter.copy_(tensors[name])


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
        modules |= {part: getattr(models, part).to(device) for part in wanted}
    for part, module in modules.items():
        module.requires_grad_(bool(rates[part])).train(bool(rates[part]))
    freeze_blocks(modules["unet"], config, models.preset)
    _freeze_unused(modules["text_encoder"])
    if config.gradient_checkpointing:
        modules["unet"].enable_gradient_checkpointing()
        for part in ("text_encoder", "text_encoder_2"):
            if rates[part]:
                _checkpoint_activations(modules[part])
    groups = parameter_groups(modules, config, models.preset)
    return TrainedModels(denoiser=Denoiser(**modules), groups=groups, preset=models.preset)


def _checkpoint_activations(text_encoder: Any) -> None:
    """transformers renamed the switch within release 5."""
    enable = getattr(text_encoder, "activation_checkpointing_enable", None)
    (enable or text_encoder.gradient_checkpointing_enable)({"use_reentrant": False})


def _freeze_unused(text_encoder: nn.Module) -> None:
    """SDXL reads CLIP-L before its last layer; that layer and the final norm never get a gradient."""
    encoder: Any = text_encoder
    encoder = getattr(encoder, "text_model", encoder)
    encoder.encoder.layers[-1].requires_grad_(False)
    encoder.final_layer_norm.requires_grad_(False)


def save_checkpoint(models: TrainedModels, config: TrainConfig, *, digest: str, num_steps: int) -> FileRef:
    """Write `model/<output_name>.safetensors`: trained parts as trained, all others exactly as in the base model.

    `digest`: of the training set, for the metadata. Raises: DiskFullError, DataError.
    """
    rates = learning_rates(config)
    frozen = tuple(part for part in ("unet", "text_encoder", "text_encoder_2", "vae") if not rates.get(part))
    base = load_models(config.base_model, parts=frozen, dtype=torch.float32)
    parts = {part: getattr(base if part in frozen else models.denoiser, part) for part in (*PARTS, "vae")}
    prediction = Prediction(config.prediction_type, config.zero_terminal_snr)
    whole = SdxlModels(**parts, preset=base.preset, logit_scale=base.logit_scale, prediction=prediction)
    metadata = modelspec_metadata(title=config.output_name) | {
        "sdxl_flows.config": config.model_dump_json(),
        "sdxl_flows.dataset_digest": digest,
        "sdxl_flows.steps": str(num_steps),
        **lineage_metadata(config),
    }
    path = config.out / "model" / f"{config.output_name}.safetensors"
    return save_single_file(path, whole, precision=config.save_precision, metadata=metadata)
