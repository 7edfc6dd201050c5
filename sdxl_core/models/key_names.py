"""The one module that owns key names: the original single-file SDXL layout and diffusers/transformers names.

Names on our side are those of a diffusers folder on disk, `component.key` ("unet.conv_in.weight",
"text_encoder.text_model.…"). transformers 5 drops the `text_model.` prefix in a fresh `CLIPTextModel`; `module_names`
adapts a component's names to whatever the module in memory calls them.

Layout facts: Stability's generative-models; text_projection is stored as P with pooled = x @ P, transformers' Linear
holds its transpose.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, TypeVar

import torch
from torch import Tensor

from sdxl_core.models.presets import MODEL_COMPONENTS, Component, Preset, component_config

T = TypeVar("T")
TEXT_MODEL = "text_model."
UNET_PREFIX = "model.diffusion_model."
CLIP_L_PREFIX = "conditioner.embedders.0.transformer."
CLIP_G_PREFIX = "conditioner.embedders.1.model."
VAE_PREFIX = "first_stage_model."
LOGIT_SCALE = CLIP_G_PREFIX + "logit_scale"
_NOTHING_LEARNT = (".position_ids", ".attn_mask")  # buffers that some tools write out
_UNUSED = (CLIP_L_PREFIX + "text_projection.weight", CLIP_L_PREFIX + "logit_scale", LOGIT_SCALE)  # by SDXL

_RESNET = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "time_emb_proj": "emb_layers.1",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "conv_shortcut": "skip_connection",
}
_VAE_ATTENTION = {"group_norm": "norm", "to_q": "q", "to_k": "k", "to_v": "v", "to_out.0": "proj_out"}
_OLD_VAE_ATTENTION = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}
_CLIP_G_LAYER = {
    "layer_norm1": "ln_1",
    "layer_norm2": "ln_2",
    "mlp.fc1": "mlp.c_fc",
    "mlp.fc2": "mlp.c_proj",
    "self_attn.out_proj": "attn.out_proj",
}
_CLIP_G_TOP = {
    "text_model.embeddings.token_embedding.weight": "token_embedding.weight",
    "text_model.embeddings.position_embedding.weight": "positional_embedding",
    "text_model.final_layer_norm.weight": "ln_final.weight",
    "text_model.final_layer_norm.bias": "ln_final.bias",
    "text_projection.weight": "text_projection",
}


def unet_prefixes(config: Mapping[str, Any]) -> dict[str, str]:
    """diffusers module -> original module of the U-Net, for every module that is renamed."""
    names = {
        "time_embedding.linear_1": "time_embed.0",
        "time_embedding.linear_2": "time_embed.2",
        "add_embedding.linear_1": "label_emb.0.0",
        "add_embedding.linear_2": "label_emb.0.2",
        "conv_in": "input_blocks.0.0",
        "mid_block.resnets.0": "middle_block.0",
        "mid_block.attentions.0": "middle_block.1",
        "mid_block.resnets.1": "middle_block.2",
        "conv_norm_out": "out.0",
        "conv_out": "out.2",
    }
    layers, last = config["layers_per_block"], len(config["down_block_types"]) - 1
    number = 1
    for block, kind in enumerate(config["down_block_types"]):
        for layer in range(layers):
            names[f"down_blocks.{block}.resnets.{layer}"] = f"input_blocks.{number}.0"
            if kind.startswith("CrossAttn"):
                names[f"down_blocks.{block}.attentions.{layer}"] = f"input_blocks.{number}.1"
            number += 1
        if block != last:
            names[f"down_blocks.{block}.downsamplers.0.conv"] = f"input_blocks.{number}.0.op"
            number += 1
    number = 0
    for block, kind in enumerate(config["up_block_types"]):
        attends = kind.startswith("CrossAttn")
        for layer in range(layers + 1):
            names[f"up_blocks.{block}.resnets.{layer}"] = f"output_blocks.{number}.0"
            if attends:
                names[f"up_blocks.{block}.attentions.{layer}"] = f"output_blocks.{number}.1"
            if layer == layers and block != last:
                names[f"up_blocks.{block}.upsamplers.0.conv"] = f"output_blocks.{number}.{1 + attends}.conv"
            number += 1
    return names


def vae_prefixes(config: Mapping[str, Any]) -> dict[str, str]:
    """diffusers module -> original module of the VAE."""
    names = {"quant_conv": "quant_conv", "post_quant_conv": "post_quant_conv"}
    num_blocks, layers = len(config["block_out_channels"]), config["layers_per_block"]
    for half in ("encoder", "decoder"):
        names |= {
            f"{half}.conv_in": f"{half}.conv_in",
            f"{half}.conv_out": f"{half}.conv_out",
            f"{half}.conv_norm_out": f"{half}.norm_out",
            f"{half}.mid_block.resnets.0": f"{half}.mid.block_1",
            f"{half}.mid_block.resnets.1": f"{half}.mid.block_2",
            f"{half}.mid_block.attentions.0": f"{half}.mid.attn_1",
        }
    for block in range(num_blocks):
        mirrored = num_blocks - 1 - block
        for layer in range(layers):
            names[f"encoder.down_blocks.{block}.resnets.{layer}"] = f"encoder.down.{block}.block.{layer}"
        for layer in range(layers + 1):
            names[f"decoder.up_blocks.{block}.resnets.{layer}"] = f"decoder.up.{mirrored}.block.{layer}"
        names[f"encoder.down_blocks.{block}.downsamplers.0.conv"] = f"encoder.down.{block}.downsample.conv"
        names[f"decoder.up_blocks.{block}.upsamplers.0.conv"] = f"decoder.up.{mirrored}.upsample.conv"
    return names


def _module_and_rest(key: str, names: Mapping[str, str]) -> tuple[str, str]:
    module = key
    while module not in names:
        module, dot, _ = module.rpartition(".")
        if not dot:
            raise KeyError(key)
    return names[module], key.removeprefix(module)


def _swap_head(rest: str, names: Mapping[str, str]) -> str:
    """`.conv1.weight` -> `.in_layers.2.weight`: the longest head of `rest` that is renamed."""
    for ours, theirs in names.items():
        if rest.startswith(f".{ours}."):
            return f".{theirs}{rest[len(ours) + 1 :]}"
    return rest


def original_unet_key(key: str, prefixes: Mapping[str, str]) -> str:
    """`down_blocks.0.resnets.0.conv1.weight` -> `model.diffusion_model.input_blocks.1.0.in_layers.2.weight`."""
    module, rest = _module_and_rest(key, prefixes)
    return UNET_PREFIX + module + (_swap_head(rest, _RESNET) if ".resnets." in key else rest)


def original_vae_key(key: str, prefixes: Mapping[str, str]) -> str:
    """`encoder.mid_block.attentions.0.to_q.weight` -> `first_stage_model.encoder.mid.attn_1.q.weight`."""
    module, rest = _module_and_rest(key, prefixes)
    if ".attentions." in key:
        rest = _swap_head(rest, _VAE_ATTENTION)
    return VAE_PREFIX + module + rest.replace(".conv_shortcut.", ".nin_shortcut.")


def _clip_g_layer_key(key: str) -> str:
    """`text_model.encoder.layers.3.mlp.fc1.bias` -> `transformer.resblocks.3.mlp.c_fc.bias`."""
    number, _, rest = key.removeprefix("text_model.encoder.layers.").partition(".")
    return f"transformer.resblocks.{number}" + _swap_head("." + rest, _CLIP_G_LAYER)


def to_original(component: Component, state: Mapping[str, Tensor], preset: Preset) -> dict[str, Tensor]:
    """A component's tensors (names as in a diffusers folder) under their names, and in their shapes, in a single file.

    Attention weights of bigG are concatenated (q, k, v), its text_projection is transposed, the VAE's attention
    matrices become 1x1 convolutions. Tensors are views of the input wherever nothing is concatenated.
    """
    if component == "text_encoder":
        return {CLIP_L_PREFIX + key: tensor for key, tensor in state.items()}
    if component == "text_encoder_2":
        return _clip_g_to_original(state)
    prefixes = _prefixes(component, preset)
    if component == "unet":
        return {original_unet_key(key, prefixes): tensor for key, tensor in state.items()}
    return {
        original_vae_key(key, prefixes): tensor[:, :, None, None] if is_vae_attention(key) else tensor
        for key, tensor in state.items()
    }


def _prefixes(component: Component, preset: Preset) -> dict[str, str]:
    if component == "unet":
        return unet_prefixes(component_config(preset, component))
    return vae_prefixes(component_config(preset, component)) if component == "vae" else {}


def _clip_g_to_original(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    result: dict[str, Tensor] = {}
    for key, tensor in state.items():
        if key in _CLIP_G_TOP:
            name = _CLIP_G_TOP[key]
            result[CLIP_G_PREFIX + name] = tensor.T.contiguous() if name == "text_projection" else tensor
        elif ".self_attn.q_proj." in key:
            parts = [state[key.replace(".q_proj.", f".{part}_proj.")] for part in "qkv"]
            layer = _clip_g_layer_key(key).partition(".self_attn.")[0]
            result[f"{CLIP_G_PREFIX}{layer}.attn.in_proj_{key.rpartition('.')[2]}"] = torch.cat(parts)
        elif ".self_attn.k_proj." not in key and ".self_attn.v_proj." not in key:
            result[CLIP_G_PREFIX + _clip_g_layer_key(key)] = tensor
    return result


def from_original(
    component: Component, original: Mapping[str, Tensor], preset: Preset, wanted: Iterable[str]
) -> dict[str, Tensor]:
    """The `wanted` keys of a component (names as in a diffusers folder) out of a single file's tensors.

    A wanted key that the file lacks is left out of the result: the caller says which, and why that matters.
    """
    result: dict[str, Tensor] = {}
    prefixes = _prefixes(component, preset)
    for key in wanted:
        tensor = _take(component, original, key, prefixes)
        if tensor is not None:
            result[key] = tensor
    return result


def _take(component: Component, original: Mapping[str, Tensor], key: str, prefixes: Mapping[str, str]) -> Tensor | None:
    if component == "text_encoder":
        return original.get(CLIP_L_PREFIX + key)
    if component == "text_encoder_2":
        return _take_clip_g(original, key)
    if component == "unet":
        return original.get(original_unet_key(key, prefixes))
    tensor = original.get(original_vae_key(key, prefixes))
    return tensor[:, :, 0, 0] if tensor is not None and is_vae_attention(key) and tensor.ndim == 4 else tensor


def _take_clip_g(original: Mapping[str, Tensor], key: str) -> Tensor | None:
    if key in _CLIP_G_TOP:
        tensor = original.get(CLIP_G_PREFIX + _CLIP_G_TOP[key])
        return tensor.T.contiguous() if tensor is not None and key == "text_projection.weight" else tensor
    head, found, tail = key.partition(".self_attn.")
    if found and not tail.startswith("out_proj."):
        layer = _clip_g_layer_key(head + ".").rstrip(".")
        joined = original.get(f"{CLIP_G_PREFIX}{layer}.attn.in_proj_{tail.rpartition('.')[2]}")
        return None if joined is None else joined.chunk(3)["qkv".index(tail[0])].clone()
    return original.get(CLIP_G_PREFIX + _clip_g_layer_key(key))


def module_names(tensors: Mapping[str, T], module_keys: Iterable[str]) -> dict[str, T]:
    """A component under the names that a module in memory uses: with or without `text_model.`."""
    known = set(module_keys)
    renamed = {}
    for key, tensor in tensors.items():
        bare = key.removeprefix(TEXT_MODEL)
        renamed[bare if key not in known and bare in known else key] = tensor
    return renamed


def folder_names(component: Component, tensors: Mapping[str, T]) -> dict[str, T]:
    """A component under the names that a diffusers folder uses, whoever wrote it.

    Text encoders carry `text_model.`; a VAE's attention is `to_q`, `to_k`, `to_v`, `to_out.0` (older folders say
    `query`, `key`, `value`, `proj_attn`). Buffers such as position_ids are left out.
    """
    kept = {key: tensor for key, tensor in tensors.items() if not key.endswith(_NOTHING_LEARNT)}
    if component == "vae":
        return {_current_vae_key(key): tensor for key, tensor in kept.items()}
    if component == "unet":
        return kept
    return {
        key if key.startswith((TEXT_MODEL, "text_projection.")) else TEXT_MODEL + key: tensor
        for key, tensor in kept.items()
    }


def _current_vae_key(key: str) -> str:
    head, found, rest = key.partition(".attentions.0.")
    return head + found + _swap_head("." + rest, _OLD_VAE_ATTENTION)[1:] if found else key


def prefix_of(component: Component) -> str:
    """What a component's keys begin with in a single file."""
    prefixes = (UNET_PREFIX, CLIP_L_PREFIX, CLIP_G_PREFIX, VAE_PREFIX)
    return dict(zip(MODEL_COMPONENTS, prefixes, strict=True))[component]


def ignorable(key: str) -> bool:
    """Keys beside SDXL's own that carry nothing to learn, or nothing SDXL uses."""
    return key.endswith(_NOTHING_LEARNT) or key in _UNUSED or key.startswith("loss.")


def vae_file_keys(keys: Iterable[str], preset: Preset, wanted: Iterable[str]) -> dict[str, str]:
    """A VAE's names in a diffusers folder -> its names in a file: LDM keys with or without prefix, or diffusers keys.

    Keys of the file that no VAE has stay as they are, so that the caller can complain about them.
    """
    prefixes = vae_prefixes(component_config(preset, "vae"))
    bare_names = {original_vae_key(key, prefixes).removeprefix(VAE_PREFIX): key for key in wanted}
    in_checkpoint = [key for key in keys if key.startswith(VAE_PREFIX)]
    result = {}
    for key in in_checkpoint or keys:
        bare = key.removeprefix(VAE_PREFIX)
        result[bare_names.get(bare) or _current_vae_key(bare)] = key
    return result


def is_vae_attention(key: str) -> bool:
    """A matrix in diffusers' layout, a 1x1 convolution in the original one (and either in files of other tools)."""
    return ".attentions." in key and key.endswith(".weight") and ".group_norm." not in key
