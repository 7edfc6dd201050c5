"""One model in its two forms, there and back, and what it says of itself."""

from __future__ import annotations

from pathlib import Path

import orjson
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from sdxl_core.config.convert import ConvertModelConfig
from sdxl_core.errors import CheckpointError, ConfigError
from sdxl_core.models import Prediction, SdxlModels, check_base_model, load_models, save_single_file
from sdxl_core.models.convert import convert_model
from sdxl_core.models.key_names import folder_names, to_original
from sdxl_core.models.load import _new_module
from sdxl_core.models.presets import MODEL_COMPONENTS, PRESETS, Component, Preset, tensor_shapes


def convert(model: Path, out: Path, **options: str) -> Path:
    convert_model(ConvertModelConfig(model=model, out=out, **options))  # type: ignore[arg-type]
    return out


def metadata(path: Path) -> dict[str, str]:
    with safe_open(path, framework="pt") as file:
        told: dict[str, str] = file.metadata()
        return told


@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize("part", MODEL_COMPONENTS)
def test_the_shipped_table_of_tensors_is_what_the_modules_have(part: Component, preset: Preset) -> None:
    with torch.device("meta"):
        state = folder_names(part, _new_module(part, preset).state_dict())
    assert {key: tuple(value.shape) for key, value in state.items()} == tensor_shapes(preset, part)
    original = to_original(part, state, preset)
    assert {key: tuple(value.shape) for key, value in original.items()} == tensor_shapes(preset, part, original=True)


def test_there_and_back_nothing_changes(tmp_path: Path, single_file: Path) -> None:
    folder = convert(single_file, tmp_path / "folder", precision="fp32")
    back = convert(folder, tmp_path / "back.safetensors", precision="fp32")
    one, other = load_file(single_file), load_file(back)
    assert one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)


@pytest.mark.parametrize(("precision", "dtype"), [("fp16", torch.float16), ("bf16", torch.bfloat16)])
def test_every_tensor_gets_the_asked_precision(
    tmp_path: Path, single_file: Path, precision: str, dtype: torch.dtype
) -> None:
    made, base = (
        load_file(convert(single_file, tmp_path / "m.safetensors", precision=precision)),
        load_file(single_file),
    )
    assert all(made[key].dtype == dtype and torch.equal(made[key], base[key].to(dtype)) for key in base)


def test_metadata_and_v_prediction_go_along(tmp_path: Path, tiny: SdxlModels) -> None:
    from dataclasses import replace

    says_v = replace(tiny, prediction=Prediction("v_prediction", True))
    told = {"modelspec.title": "mine", "modelspec.prediction_type": "v", "sdxl_flows.dataset_digest": "abc"}
    save_single_file(tmp_path / "v.safetensors", says_v, precision="fp16", metadata=told)
    folder = convert(tmp_path / "v.safetensors", tmp_path / "folder")
    scheduler = orjson.loads((folder / "scheduler" / "scheduler_config.json").read_bytes())
    assert (scheduler["prediction_type"], scheduler["rescale_betas_zero_snr"]) == ("v_prediction", True)
    back = convert(folder, tmp_path / "back.safetensors", title="renamed")
    assert {"v_pred", "ztsnr"} <= load_file(back).keys()
    assert metadata(back) == told | {"modelspec.title": "renamed", "modelspec.prediction_type": "v", "format": "pt"}


def test_a_model_that_says_nothing_gets_modelspec_metadata(tmp_path: Path, single_file: Path) -> None:
    told = metadata(convert(single_file, tmp_path / "named.safetensors"))
    assert told["modelspec.title"] == "named" and told["modelspec.architecture"] == "stable-diffusion-xl-v1-base"


def test_nothing_is_overwritten_by_mistake(tmp_path: Path, single_file: Path) -> None:
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.txt").write_text("mine")
    (tmp_path / "file").write_text("mine")
    for out, words in (("full", "holds other things"), ("file", "must end in .safetensors")):
        with pytest.raises(ConfigError, match=words):
            convert(single_file, tmp_path / out)
    with pytest.raises(ConfigError, match="the model itself"):
        convert(single_file, single_file)


def test_a_base_model_is_judged_by_its_headers_alone(tmp_path: Path, single_file: Path, folder: Path) -> None:
    check_base_model("tiny")
    check_base_model(str(folder))
    check_base_model(str(single_file))
    data = single_file.read_bytes()
    (tmp_path / "cut.safetensors").write_bytes(data[: len(data) - 1000])
    with pytest.raises(CheckpointError, match="cut short"):
        check_base_model(str(tmp_path / "cut.safetensors"))
    assert load_models(str(single_file), parts=(), dtype=torch.float32).unet is None
