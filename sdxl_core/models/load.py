"""Loading SDXL: `tiny`, a single-file .safetensors or a diffusers folder. Strict about names and shapes, no network."""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import orjson
import torch
from torch import Tensor

from sdxl_core.errors import CheckpointError
from sdxl_core.files import digest_of
from sdxl_core.models.key_names import (
    LOGIT_SCALE,
    UNET_PREFIX,
    VAE_PREFIX,
    folder_names,
    from_original,
    is_vae_attention,
    module_names,
    prefix_of,
    vae_file_keys,
)
from sdxl_core.models.prediction import EPSILON, Prediction, prediction_of_file, prediction_of_scheduler
from sdxl_core.models.presets import MODEL_COMPONENTS, PRESETS, Component, Preset, component_config, tensor_shapes
from sdxl_core.models.recognise import refuse_differences, what_it_is
from sdxl_core.models.weights import (
    WeightFile,
    WeightFiles,
    Weights,
    component_files,
    content_digest,
    dated_digest,
    raw_bytes,
)

TINY: Preset = "tiny"
TINY_MEAN_GAIN, TINY_LOGVAR = 50.0, -2.0
OLD_SCALING_FACTOR = 0.18215  # Stable Diffusion 1 and 2, and what diffusers assumes where a config names none
SCHEDULER_CONFIG = Path("scheduler") / "scheduler_config.json"
_MAKING = threading.Lock()  # accelerate's empty weights and torch's seed hold for all threads of a process
_CLASSES = {
    "unet": ("diffusers", "UNet2DConditionModel"),
    "vae": ("diffusers", "AutoencoderKL"),
    "text_encoder": ("transformers", "CLIPTextModel"),
    "text_encoder_2": ("transformers", "CLIPTextModelWithProjection"),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class SdxlModels:
    """SDXL's components; a part that was not asked for is None. `logit_scale`: kept from a single file, or None.

    prediction: what the U-Net predicts, as the files say.
    """

    preset: Preset
    unet: Any = None
    text_encoder: Any = None
    text_encoder_2: Any = None
    vae: Any = None
    logit_scale: Tensor | None = None
    prediction: Prediction = EPSILON


def load_models(
    base_model: str, *, parts: Collection[str] = MODEL_COMPONENTS, dtype: torch.dtype | None, seed: int = 0
) -> SdxlModels:
    """Load the asked-for parts of a base model in evaluation mode. All parts must be there, whole, asked for or not.

    Args:   base_model: `tiny` (random weights from `seed`), a single file or a diffusers folder.
            parts: of unet, text_encoder, text_encoder_2, vae.
            dtype: of all weights; None: each as it is (8-bit ones in float32).
    Raises: ConfigError: nothing there.
            CheckpointError: not SDXL, cut short, or tensors are missing, unknown or of another shape.
    """
    wanted: list[Component] = [part for part in MODEL_COMPONENTS if part in parts]
    if base_model == TINY:
        return SdxlModels(preset="tiny", **{part: _random_module(part, seed, dtype) for part in wanted})
    path = Path(base_model)
    if path.is_dir():
        return _load_folder(path, wanted, dtype)
    return _load_single_file(path, wanted, dtype)


def load_vae(vae: str, *, dtype: torch.dtype) -> Any:
    """An AutoencoderKL in evaluation mode.

    Args:   vae: `tiny`, a single file (whole checkpoint, or a VAE in LDM or diffusers keys), a diffusers folder or
            its vae/.   dtype: of all weights.
    Raises: ConfigError: nothing there.   CheckpointError: not SDXL's, cut short, or other tensors than it has.
    """
    if vae == TINY:
        return _random_module("vae", 0, dtype)
    preset, tensors = _vae_tensors(vae)
    return _fill("vae", preset, tensors, dtype)


def vae_fingerprint(vae: str) -> str:
    """SHA-256 (64 hex digits) over a VAE's tensors: the same for the same VAE in any container `load_vae` reads.

    Covers diffusers name, dtype, shape and bytes of each; reads nothing else of a checkpoint. Raises: as `load_vae`.
    """
    tensors = _random_module("vae", 0, torch.float32).state_dict() if vae == TINY else _vae_tensors(vae)[1]
    digest = hashlib.sha256()
    for key in sorted(tensors):
        tensor = tensors[key]
        digest.update(f"{key}|{tensor.dtype}|{list(tensor.shape)}|".encode())
        digest.update(raw_bytes(tensor))
    return digest.hexdigest()


def model_fingerprint(base_model: str) -> str:
    """A cheap identity of a base model by its content, the same for every copy, to tell whether a run may resume.

    Raises: ConfigError: nothing there.   CheckpointError: not safetensors, or cut short.
    """
    return _fingerprint(base_model, content_digest)


def dated_fingerprint(base_model: str) -> str:
    """What states of version 0.1 know a base model by; a copy with another time counts as another one.

    Raises: as `model_fingerprint`.
    """
    return _fingerprint(base_model, dated_digest)


def _fingerprint(base_model: str, digest: Callable[[Path], str]) -> str:
    if base_model == TINY:
        return digest_of(TINY, *(orjson.dumps(component_config(TINY, part)) for part in MODEL_COMPONENTS))
    path = Path(base_model)
    if not path.is_dir():
        return digest(path)
    files = [file for part in MODEL_COMPONENTS for file in component_files(_subfolder(path, part))]
    return digest_of(*(digest(file) for file in files))


def check_base_model(base_model: str) -> None:
    """Refuse what `load_models` would refuse, from headers alone, in a second. Raises: as `load_models`."""
    load_models(base_model, parts=(), dtype=torch.float32)


def preset_of(base_model: str) -> Preset:
    """Which of our configs a base model has, from its header alone.

    Raises: ConfigError: nothing there.   CheckpointError: not SDXL.
    """
    if base_model == TINY:
        return TINY
    path = Path(base_model)
    if path.is_dir():
        shapes = _folder_weights(_subfolder(path, "unet")).shapes
        preset = _preset_of_unet(shapes.get("conv_in.weight"), shapes.get("add_embedding.linear_1.weight"))
    else:
        shapes = WeightFile(path).shapes
        preset = _preset_of_checkpoint(WeightFile(path))
    if preset is None:
        raise CheckpointError(f"{path}: not an SDXL model; it looks like {what_it_is(shapes)}.")
    return preset


def meta_module(part: Component, preset: Preset) -> Any:
    """A component on the meta device: names, shapes and code without weights."""
    with torch.device("meta"):
        return _new_module(part, preset)


def base_prediction(base_model: str) -> Prediction:
    """What a base model says it predicts, from its header or scheduler config alone. Raises: as `load_models`."""
    if base_model == TINY:
        return EPSILON
    path = Path(base_model)
    if path.is_dir():
        return prediction_of_scheduler(_read_config(path / SCHEDULER_CONFIG))
    file = WeightFile(path)
    return prediction_of_file(file.shapes, file.metadata)


def _load_single_file(path: Path, wanted: list[Component], dtype: torch.dtype | None) -> SdxlModels:
    file = WeightFile(path)
    preset = _preset_of_checkpoint(file)
    if preset is None:
        raise CheckpointError(
            f"{path}: not an SDXL checkpoint; it looks like {what_it_is(file.shapes)}. Name a single-file SDXL "
            f"checkpoint (U-Net, both text encoders and VAE in one .safetensors), a diffusers folder, or tiny."
        )
    lacking = [part for part in MODEL_COMPONENTS if not any(key.startswith(prefix_of(part)) for key in file)]
    if lacking:
        raise CheckpointError(
            f"{path}: has no {' and no '.join(lacking)}; it looks like {what_it_is(file.shapes)}. Training and saving "
            f"need all parts: name a complete SDXL checkpoint."
        )
    for part in ("unet", "text_encoder", "text_encoder_2"):
        prefix = prefix_of(part)
        found = {key: shape for key, shape in file.shapes.items() if key.startswith(prefix)}
        refuse_differences(str(path), part, found, _original_shapes(part, preset))
    tensors: dict[str, Mapping[str, Tensor]] = {"vae": _named_vae(file, preset, str(path), read="vae" in wanted)}
    tensors |= {
        part: from_original(part, file, preset, _shapes(part, preset))
        for part in wanted
        if part != "vae"
    }  # fmt: skip
    modules = {part: _fill(part, preset, tensors.pop(part), dtype) for part in wanted}
    prediction = prediction_of_file(file.shapes, file.metadata)
    return SdxlModels(preset=preset, logit_scale=file.get(LOGIT_SCALE), prediction=prediction, **modules)


def _load_folder(folder: Path, wanted: list[Component], dtype: torch.dtype | None) -> SdxlModels:
    parts = {part: _folder_weights(_subfolder(folder, part)) for part in MODEL_COMPONENTS}
    shapes = parts["unet"].shapes
    preset = _preset_of_unet(shapes.get("conv_in.weight"), shapes.get("add_embedding.linear_1.weight"))
    if preset is None:
        raise CheckpointError(f"{folder / 'unet'}: not SDXL's U-Net. Name a diffusers folder of an SDXL model.")
    modules: dict[Component, Any] = {}
    for part, weights in parts.items():
        if part == "vae":
            _refuse_scaling_factor(folder / part, preset)
            tensors: Mapping[str, Tensor] = _named_vae(weights, preset, str(folder / part), read=part in wanted)
        else:
            names = folder_names(part, {key: key for key in weights})
            found = {name: weights.shapes[key] for name, key in names.items()}
            refuse_differences(str(folder / part), part, found, _shapes(part, preset))
            tensors = {name: weights[key] for name, key in names.items()} if part in wanted else {}
        if part in wanted:
            modules[part] = _fill(part, preset, tensors, dtype)
    prediction = prediction_of_scheduler(_read_config(folder / SCHEDULER_CONFIG))
    return SdxlModels(preset=preset, prediction=prediction, **modules)


def _vae_tensors(vae: str) -> tuple[Preset, dict[str, Tensor]]:
    """The VAE's tensors under diffusers names, and the preset their shapes belong to."""
    path = Path(vae)
    if path.is_dir():
        path = path / "vae" if (path / "vae").is_dir() else path
        weights: Weights = _folder_weights(path)
    else:
        weights = WeightFile(path)
    first = next((weights.shapes[key] for key in (f"{VAE_PREFIX}encoder.conv_in.weight", "encoder.conv_in.weight")
                  if key in weights.shapes), (0,))  # fmt: skip
    preset = next((p for p in PRESETS if component_config(p, "vae")["block_out_channels"][0] == first[0]), None)
    holds_unet = any(key.startswith(UNET_PREFIX) for key in weights)
    if preset is None or (holds_unet and _preset_of_checkpoint(weights) is None):
        raise CheckpointError(
            f"{path}: holds no VAE of SDXL; it looks like {what_it_is(weights.shapes)}. Name an SDXL checkpoint, an "
            f"SDXL VAE (.safetensors or diffusers folder), or tiny."
        )
    _refuse_scaling_factor(path, preset)
    return preset, _named_vae(weights, preset, str(path))


def _named_vae(weights: Weights, preset: Preset, where: str, *, read: bool = True) -> dict[str, Tensor]:
    """A VAE under diffusers names, its attention as matrices; {} where it is only to be checked.

    Raises: CheckpointError: other tensors than SDXL's.
    """
    expected = _shapes("vae", preset)
    keys = vae_file_keys(weights.shapes, preset, expected)
    shapes = {name: weights.shapes[key] for name, key in keys.items()}
    matrices = {name for name, shape in shapes.items() if is_vae_attention(name) and shape[2:] == (1, 1)}
    shapes |= {name: shapes[name][:2] for name in matrices}
    refuse_differences(where, "vae", shapes, expected)
    if not read:
        return {}
    tensors = {name: weights[keys[name]] for name in expected}
    return {name: tensor[:, :, 0, 0] if name in matrices else tensor for name, tensor in tensors.items()}


def _refuse_scaling_factor(vae_folder: Path, preset: Preset) -> None:
    config = _read_config(vae_folder / "config.json")
    factor = config.get("scaling_factor", OLD_SCALING_FACTOR) if config else None
    expected = component_config(preset, "vae")["scaling_factor"]
    if factor not in (None, expected):
        raise CheckpointError(
            f"{vae_folder}: its config.json says scaling_factor {factor}, SDXL's VAE has {expected}: the VAE of "
            f"another model, whose latents SDXL cannot read. Name an SDXL VAE."
        )


def _read_config(path: Path) -> dict[str, Any]:
    try:
        config = orjson.loads(path.read_bytes())
    except (FileNotFoundError, NotADirectoryError):
        return {}
    except orjson.JSONDecodeError as error:
        raise CheckpointError(f"{path}: not JSON ({error}). Fetch it again.") from error
    return config if isinstance(config, dict) else {}


def _preset_of_checkpoint(weights: Weights) -> Preset | None:
    names = ("input_blocks.0.0.weight", "label_emb.0.0.weight")
    return _preset_of_unet(*(weights.shapes.get(UNET_PREFIX + name) for name in names))


def _preset_of_unet(conv_in: tuple[int, ...] | None, add_embedding: tuple[int, ...] | None) -> Preset | None:
    """The preset whose first convolution and size conditioning have these shapes."""
    for preset in PRESETS:
        config = component_config(preset, "unet")
        first = (config["block_out_channels"][0], config["in_channels"])
        inputs = config["projection_class_embeddings_input_dim"]
        if conv_in and add_embedding and conv_in[:2] == first and add_embedding[1:] == (inputs,):
            return preset
    return None


def _subfolder(folder: Path, part: Component) -> Path:
    if not (folder / part).is_dir():
        raise CheckpointError(
            f"{folder}: there is no folder {part}/ in it, so it is not a diffusers SDXL model. Name the folder that "
            f"holds unet/, text_encoder/, text_encoder_2/ and vae/."
        )
    return folder / part


def _folder_weights(folder: Path) -> WeightFiles:
    return WeightFiles([WeightFile(file) for file in component_files(folder)])


def _shapes(part: Component, preset: Preset) -> Mapping[str, tuple[int, ...]]:
    """Names (as in a diffusers folder) and shapes of a component."""
    return tensor_shapes(preset, part)


def _original_shapes(part: Component, preset: Preset) -> Mapping[str, tuple[int, ...]]:
    """Names and shapes of a component in a single file."""
    return tensor_shapes(preset, part, original=True)


def _new_module(part: Component, preset: Preset) -> Any:
    config = component_config(preset, part)
    library, name = _CLASSES[part]
    if library == "diffusers":
        import diffusers

        return getattr(diffusers, name)(**config)
    import transformers

    return getattr(transformers, name)(transformers.CLIPTextConfig(**config))


def _random_module(part: Component, seed: int, dtype: torch.dtype | None) -> Any:
    with _MAKING, torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed * len(MODEL_COMPONENTS) + MODEL_COMPONENTS.index(part))
        module = _new_module(part, "tiny").eval()
        if part == "vae":
            _follow_the_picture(module)
    for parameter in module.parameters():
        parameter.data = parameter.data.to(dtype or parameter.dtype)
    return module


def _follow_the_picture(vae: Any) -> None:
    """Give the tiny VAE what a trained one has: means of SDXL's scale (std about 7) and a narrow posterior.

    Freshly initialised, its means vary by 0.14 and its posterior by 1, so that a sample would be nothing but noise.
    """
    channels = vae.config.latent_channels
    with torch.no_grad():
        vae.quant_conv.weight[:channels] *= TINY_MEAN_GAIN
        vae.quant_conv.weight[channels:] = 0
        vae.quant_conv.bias[channels:] = TINY_LOGVAR


def _fill(part: Component, preset: Preset, tensors: Mapping[str, Tensor], dtype: torch.dtype | None) -> Any:
    """A module with these (checked) tensors, never held twice: it is made without weights, which are then assigned."""
    from accelerate import init_empty_weights

    cast = {key: tensor.to(dtype or _own_dtype(tensor)) for key, tensor in tensors.items()}
    with _MAKING:
        with init_empty_weights(include_buffers=False):
            module = _new_module(part, preset)
        module.load_state_dict(module_names(cast, module.state_dict()), strict=True, assign=True)
    return module.eval()


def _own_dtype(tensor: Tensor) -> torch.dtype:
    """What holds a tensor's values exactly and can be computed with."""
    return tensor.dtype if tensor.dtype in (torch.float16, torch.bfloat16) else torch.float32
