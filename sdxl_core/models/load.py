"""Loading SDXL: `tiny`, a single-file .safetensors or a diffusers folder. Strict about names and shapes."""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sdxl_core.errors import CheckpointError, ConfigError
from sdxl_core.files import digest_of
from sdxl_core.models.key_names import LOGIT_SCALE, from_original, ignorable, module_names, to_original
from sdxl_core.models.presets import MODEL_COMPONENTS, PRESETS, Component, Preset, component_config
from sdxl_core.models.weights import WeightFile, WeightFiles, component_files, header_digest

TINY = "tiny"
_UNET_PROBE = "model.diffusion_model.input_blocks.0.0.weight"
_VAE_PROBES = ("first_stage_model.encoder.conv_in.weight", "encoder.conv_in.weight")
_CLASSES = {
    "unet": ("diffusers", "UNet2DConditionModel"),
    "vae": ("diffusers", "AutoencoderKL"),
    "text_encoder": ("transformers", "CLIPTextModel"),
    "text_encoder_2": ("transformers", "CLIPTextModelWithProjection"),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class SdxlModels:
    """SDXL's components; a part that was not asked for is None. `logit_scale`: kept from a single file, or None."""

    preset: Preset
    unet: Any = None
    text_encoder: Any = None
    text_encoder_2: Any = None
    vae: Any = None
    logit_scale: Tensor | None = None


def load_models(
    base_model: str, *, parts: Collection[str] = MODEL_COMPONENTS, dtype: torch.dtype, seed: int = 0
) -> SdxlModels:
    """Load the asked-for parts of a base model in evaluation mode.

    Args:   base_model: `tiny` (random weights from `seed`), a single file or a diffusers folder.
            parts: of unet, text_encoder, text_encoder_2, vae.   dtype: of all floating weights.
    Raises: ConfigError: nothing there.   CheckpointError: not SDXL, cut short, keys missing or of wrong shape.
    """
    wanted: list[Component] = [part for part in MODEL_COMPONENTS if part in parts]
    if base_model == TINY:
        modules = {part: _random_module(part, seed, dtype) for part in wanted}
        return SdxlModels(preset="tiny", **modules)
    path = Path(base_model)
    if path.is_dir():
        return _load_folder(path, wanted, dtype)
    file = WeightFile(path)
    preset = _preset_of_unet(file)
    loaded = {part: _from_single_file(file, part, preset, dtype) for part in wanted}
    return SdxlModels(preset=preset, logit_scale=file.get(LOGIT_SCALE), **loaded)


def load_vae(vae: str, *, dtype: torch.dtype) -> Any:
    """An AutoencoderKL from `tiny`, a single file (whole checkpoint, or a VAE in LDM or diffusers keys) or a folder.

    Raises: ConfigError, CheckpointError.
    """
    if vae == TINY:
        return _random_module("vae", 0, dtype)
    preset, state = _vae_state(vae)
    return _fill("vae", preset, state, dtype, vae)


def vae_fingerprint(vae: str) -> str:
    """SHA-256 over the VAE's tensors under their diffusers names: the same for the same VAE in any container.

    Covers name, dtype, shape and bytes. Raises: ConfigError, CheckpointError.
    """
    state = _random_module("vae", 0, torch.float32).state_dict() if vae == TINY else _vae_state(vae)[1]
    digest = hashlib.sha256()
    for key in sorted(state):
        tensor = state[key]
        digest.update(f"{key}|{tensor.dtype}|{tuple(tensor.shape)}|".encode())
        digest.update(tensor.contiguous().view(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def model_fingerprint(base_model: str) -> str:
    """A cheap identity of a base model, for the check whether a run may be resumed. Raises as `load_models`."""
    if base_model == TINY:
        configs = [str(sorted(component_config("tiny", part).items())) for part in MODEL_COMPONENTS]
        return digest_of(TINY, *configs)
    path = Path(base_model)
    if not path.is_dir():
        return header_digest(path)
    files = [file for part in MODEL_COMPONENTS for file in component_files(_subfolder(path, part))]
    return digest_of(*(header_digest(file) for file in files))


def _vae_state(vae: str) -> tuple[Preset, dict[str, Tensor]]:
    """The VAE's tensors under diffusers names, and the preset their shapes belong to."""
    path = Path(vae)
    if path.is_dir():
        folder = path / "vae" if (path / "vae").is_dir() else path
        tensors: Mapping[str, Tensor] = WeightFiles([WeightFile(file) for file in component_files(folder)])
        probe = tensors["encoder.conv_in.weight"].shape[0] if "encoder.conv_in.weight" in tensors else 0
        what = str(folder)
    else:
        file = WeightFile(path)
        shapes = [file.shape(key) for key in _VAE_PROBES]
        probe = next((shape[0] for shape in shapes if shape), 0)
        tensors, what = file, f"{path} ({file.describe()})"
    preset = next((p for p in PRESETS if component_config(p, "vae")["block_out_channels"][0] == probe), None)
    if preset is None:
        raise CheckpointError(f"{what}: holds no VAE of SDXL's shape. Name an SDXL checkpoint, its VAE, or tiny.")
    wanted = _keys("vae", preset)
    if "encoder.down_blocks.0.resnets.0.norm1.weight" in tensors:
        return preset, {key: _matrix(tensors[key], wanted[key]) for key in wanted if key in tensors}
    return preset, from_original("vae", tensors, preset, wanted)


def _matrix(tensor: Tensor, shape: torch.Size) -> Tensor:
    """A 1x1 convolution as the matrix it is, where a matrix is wanted."""
    return tensor.reshape(shape) if tensor.ndim == 4 and len(shape) == 2 and tensor.shape[:2] == shape else tensor


def _preset_of_unet(file: WeightFile) -> Preset:
    shape = file.shape(_UNET_PROBE)
    for preset in PRESETS:
        config = component_config(preset, "unet")
        if shape and shape[:2] == (config["block_out_channels"][0], config["in_channels"]):
            if file.describe() == "a U-Net without text encoders and VAE":
                break
            return preset
    raise CheckpointError(
        f"{file.path}: not an SDXL checkpoint; it looks like {file.describe()}. Name a single-file SDXL checkpoint "
        f"(U-Net, both text encoders and VAE in one .safetensors), a diffusers folder, or tiny."
    )


def _from_single_file(file: WeightFile, part: Component, preset: Preset, dtype: torch.dtype) -> Any:
    return _fill(part, preset, from_original(part, file, preset, _keys(part, preset)), dtype, str(file.path))


def _subfolder(folder: Path, part: Component) -> Path:
    if not (folder / part).is_dir():
        raise CheckpointError(
            f"{folder}: there is no folder {part}/ in it, so it is not a diffusers SDXL model. Name the folder that "
            f"holds unet/, text_encoder/, text_encoder_2/ and vae/."
        )
    return folder / part


def _load_folder(folder: Path, wanted: list[Component], dtype: torch.dtype) -> SdxlModels:
    unet = WeightFiles([WeightFile(file) for file in component_files(_subfolder(folder, "unet"))])
    width = unet["conv_in.weight"].shape[0] if "conv_in.weight" in unet else 0
    preset = next((p for p in PRESETS if component_config(p, "unet")["block_out_channels"][0] == width), None)
    if preset is None or "add_embedding.linear_1.weight" not in unet:
        raise CheckpointError(f"{folder / 'unet'}: not SDXL's U-Net. Name a diffusers folder of an SDXL model.")
    modules: dict[Component, Any] = {}
    for part in wanted:
        if part == "vae":
            modules[part] = load_vae(str(_subfolder(folder, part)), dtype=dtype)
            continue
        files = component_files(_subfolder(folder, part))
        tensors = unet if part == "unet" else WeightFiles([WeightFile(file) for file in files])
        modules[part] = _fill(part, preset, tensors, dtype, str(folder / part))
    return SdxlModels(preset=preset, **modules)


def _keys(part: Component, preset: Preset) -> dict[str, torch.Size]:
    """Names (as in a diffusers folder) and shapes of a component."""
    with torch.device("meta"):
        state = _new_module(part, preset).state_dict()
    prefix = "text_model." if part == "text_encoder" and not any(key.startswith("text_model.") for key in state) else ""
    return {prefix + key: tensor.shape for key, tensor in state.items()}


def _new_module(part: Component, preset: Preset) -> Any:
    config = component_config(preset, part)
    library, name = _CLASSES[part]
    if library == "diffusers":
        import diffusers

        return getattr(diffusers, name)(**config)
    import transformers

    return getattr(transformers, name)(transformers.CLIPTextConfig(**config))


def _random_module(part: Component, seed: int, dtype: torch.dtype) -> Any:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed * len(MODEL_COMPONENTS) + MODEL_COMPONENTS.index(part))
        module = _new_module(part, "tiny").eval()
    for parameter in module.parameters():
        parameter.data = parameter.data.to(dtype)
    return module


def _fill(part: Component, preset: Preset, state: Mapping[str, Tensor], dtype: torch.dtype, where: str) -> Any:
    """A module with these weights; they are cast one by one and never held twice."""
    from accelerate import init_empty_weights

    with init_empty_weights(include_buffers=False):
        module = _new_module(part, preset)
    shapes = {key: tensor.shape for key, tensor in module.state_dict().items()}
    tensors = {key: tensor.to(dtype) for key, tensor in module_names(state, shapes).items()}
    missing = sorted(shapes.keys() - tensors.keys())
    unexpected = sorted(key for key in tensors.keys() - shapes.keys() if not ignorable(key))
    wrong = [f"{key} is {tuple(tensors[key].shape)}, not {tuple(shapes[key])}" for key in shapes
             if key in tensors and tensors[key].shape != shapes[key]]  # fmt: skip
    problems = [
        f"{len(found)} {what}, the first: {found[0]}"
        for what, found in (("keys are missing", missing), ("keys are unknown", unexpected), ("shapes differ", wrong))
        if found
    ]
    if problems:
        raise CheckpointError(
            f"{where}: its {part} is not SDXL's: {'; '.join(problems)}. The file is damaged or of another model."
        )
    module.load_state_dict({key: tensors[key] for key in shapes}, strict=True, assign=True)
    return module.eval()


def single_file_state(models: SdxlModels) -> dict[str, Tensor]:
    """Every tensor of a complete model under its single-file name.

    Raises: ConfigError: a component is missing.
    """
    from sdxl_core.models.key_names import folder_names

    result: dict[str, Tensor] = {}
    for part in MODEL_COMPONENTS:
        module = getattr(models, part)
        if module is None:
            raise ConfigError(f"a single file needs all of {', '.join(MODEL_COMPONENTS)}; {part} was not loaded.")
        result |= to_original(part, folder_names(part, module.state_dict()), models.preset)
    if models.logit_scale is not None:
        result[LOGIT_SCALE] = models.logit_scale
    return result
