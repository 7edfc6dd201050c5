"""Saying what a weight file is instead of SDXL, and which of its tensors differ from what SDXL has."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping

from sdxl_core.errors import CheckpointError
from sdxl_core.models.key_names import CLIP_G_PREFIX, CLIP_L_PREFIX, UNET_PREFIX, VAE_PREFIX, ignorable

Shape = tuple[int, ...]
NUM_SHOWN = 3
_VAE_HEADS = {"encoder", "decoder", "quant_conv", "post_quant_conv", "first_stage_model", "loss", "model_ema"}


def _some(*parts: str) -> Callable[[str], bool]:
    return lambda key: any(part in key for part in parts)


_SIGNS: tuple[tuple[str, Callable[[str], bool]], ...] = (
    ("a LoRA or another small adapter", _some("lora_", ".lora.", "hada_", "lokr_", ".dora_")),
    ("a ControlNet", _some("control_model.", "controlnet_", "input_hint_block.")),
    ("Stable Diffusion 1.x", _some("cond_stage_model.transformer.")),
    ("Stable Diffusion 2.x", _some("cond_stage_model.model.")),
    ("Stable Diffusion 3", _some("joint_blocks.", "joint_transformer_blocks.")),
    ("Flux", _some("double_blocks.", "single_transformer_blocks.")),
    ("SDXL's refiner", _some("conditioner.embedders.0.model.")),
    ("a textual inversion embedding", _some("emb_params")),
)


def what_it_is(keys: Collection[str]) -> str:
    """What a weight file seems to be, from its keys alone, in words that fit behind "it looks like"."""
    for name, sign in _SIGNS:
        if any(sign(key) for key in keys):
            return name
    heads = {key.partition(".")[0] for key in keys}
    if heads <= _VAE_HEADS:
        return "a VAE without U-Net and text encoders"
    if "down_blocks" in heads or (len(heads) == 1 and any(".down_blocks." in key for key in keys)):
        return "a diffusers U-Net (its whole folder is needed)"
    if "input_blocks" in heads or all(key.startswith(("model.diffusion_model.", "model_ema.")) for key in keys):
        return "a U-Net without text encoders and VAE"
    if heads <= {"text_model", "text_projection", "logit_scale"}:
        return "a text encoder"
    parts = {
        "text encoder 1": CLIP_L_PREFIX, "text encoder 2": CLIP_G_PREFIX, "U-Net": UNET_PREFIX, "VAE": VAE_PREFIX,
    }  # fmt: skip
    lacking = [part for part, prefix in parts.items() if not any(key.startswith(prefix) for key in keys)]
    if len(lacking) in (1, 2, 3):
        return f"an SDXL checkpoint without {' and '.join(lacking)}"
    return f"something else (its {len(keys)} tensors begin with {', '.join(sorted(heads)[:5])})"


def refuse_differences(where: str, part: str, found: Mapping[str, Shape], expected: Mapping[str, Shape]) -> None:
    """Names and shapes must be exactly the expected ones; what carries nothing (position_ids …) may be there or not.

    Raises: CheckpointError: lists the first few tensors that are missing, unknown or of another shape.
    """
    missing = [key for key in expected if key not in found]
    unknown = [key for key in sorted(found) if key not in expected and not ignorable(key)]
    wrong = [
        f"{key} is {list(found[key])} instead of {list(shape)}"
        for key, shape in expected.items()
        if key in found and found[key] != shape
    ]
    problems = [
        f"{len(keys)} {what} ({', '.join(keys[:NUM_SHOWN])}{', …' if len(keys) > NUM_SHOWN else ''})"
        for what, keys in (("missing", missing), ("unknown", unknown), ("of another shape", wrong))
        if keys
    ]
    if problems:
        raise CheckpointError(
            f"{where}: the tensors of its {part} are not SDXL's: {'; '.join(problems)}. The file is damaged, pruned or "
            f"of another architecture; fetch it again or name another model."
        )
