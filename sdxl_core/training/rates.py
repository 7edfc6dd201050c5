"""Which parameters share a learning rate: one group a part, or one a U-Net block where `block_lr` names 23 rates."""

from __future__ import annotations

import re
from typing import Any

from torch import nn

from sdxl_core.config.train.optimizer import OptimizerOptions
from sdxl_core.models import component_config
from sdxl_core.models.key_names import UNET_PREFIX, original_unet_key, unet_prefixes
from sdxl_core.models.presets import Preset
from sdxl_core.training.optimizer import ParameterGroup, parameter_group

PARTS = {"unet": "unet", "text_encoder": "text_encoder1", "text_encoder_2": "text_encoder2"}  # ours: TensorBoard's
_FIRST_BLOCK = {"input_blocks": 1, "middle_block": 10, "output_blocks": 13}
_BLOCK = re.compile(rf"{re.escape(UNET_PREFIX)}(input_blocks|middle_block|output_blocks)\.(\d+)\.")


def learning_rates(config: OptimizerOptions) -> dict[str, float]:
    """Learning rate of each part of `PARTS`, of the U-Net the highest; 0 is frozen."""
    return dict(zip(PARTS, (config.unet_rate, config.learning_rate_te1, config.learning_rate_te2), strict=True))


def block_of(name: str, preset: Preset) -> int:
    """Number of the block, 0 to 22, that a U-Net parameter (diffusers name) belongs to, as sd-scripts counts them.

    0: time and size embeddings; 1-9: input blocks; 10-12: middle blocks; 13-21: output blocks; 22: output layer.
    """
    key = original_unet_key(name, unet_prefixes(component_config(preset, "unet")))
    match = _BLOCK.match(key)
    if match:
        return _FIRST_BLOCK[match[1]] + int(match[2])
    return 22 if key.startswith(f"{UNET_PREFIX}out.") else 0


def freeze_blocks(unet: nn.Module, config: OptimizerOptions, preset: Preset) -> None:
    """Take the gradient from blocks whose rate is 0."""
    if config.block_lr:
        for name, parameter in unet.named_parameters():
            if not config.block_lr[block_of(name, preset)]:
                parameter.requires_grad_(False)


def parameter_groups(modules: dict[str, Any], config: OptimizerOptions, preset: Preset) -> tuple[ParameterGroup, ...]:
    """The trainable parameters of U-Net and text encoders, in groups of one rate. modules: by the keys of `PARTS`."""
    groups = []
    for part, rate in learning_rates(config).items():
        if part == "unet" and config.block_lr:
            groups += _block_groups(parameter_group(PARTS[part], modules[part], rate), config.block_lr, preset)
        elif rate:
            groups.append(parameter_group(PARTS[part], modules[part], rate))
    return tuple(groups)


def _block_groups(unet: ParameterGroup, rates: tuple[float, ...], preset: Preset) -> list[ParameterGroup]:
    """One group a block that trains, named `block<number>`; parameters keep the names they have without block rates."""
    members: dict[int, list[tuple[str, nn.Parameter]]] = {}
    for name, parameter in zip(unet.names, unet.parameters, strict=True):
        members.setdefault(block_of(name.removeprefix("unet."), preset), []).append((name, parameter))
    return [
        ParameterGroup(
            name=f"block{block}",
            names=tuple(name for name, _ in members[block]),
            parameters=tuple(parameter for _, parameter in members[block]),
            learning_rate=rates[block],
        )
        for block in sorted(members)
    ]
