"""What a model predicts is read from files, written into them, and held against what a run trains."""

from dataclasses import replace
from pathlib import Path

import orjson
import pytest
import torch
from diffusers import DDIMScheduler
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from sdxl_core.config import TrainOptions
from sdxl_core.config.train.objective import PredictionType
from sdxl_core.errors import ConfigError
from sdxl_core.models import (
    Prediction,
    SdxlModels,
    base_prediction,
    check_prediction,
    load_models,
    save_diffusers_folder,
    save_single_file,
)

KINDS = [
    Prediction(),
    Prediction("v_prediction"),
    Prediction("v_prediction", zero_terminal_snr=True),
    Prediction("rectified_flow"),
]


@pytest.mark.parametrize("prediction", KINDS, ids=str)
def test_files_and_folders_keep_what_a_model_predicts(tmp_path: Path, tiny: SdxlModels, prediction: Prediction) -> None:
    models = replace(tiny, prediction=prediction)
    file, folder = tmp_path / "m.safetensors", tmp_path / "folder"
    save_single_file(file, models, precision="fp16", metadata={})
    save_diffusers_folder(folder, models, precision="fp16")
    for place in (file, folder):
        assert base_prediction(str(place)) == prediction
        assert load_models(str(place), parts=("vae",), dtype=torch.float32).prediction == prediction
    markers = {key: tensor.numel() for key, tensor in load_file(file).items() if "." not in key}
    v, zero = prediction.type == "v_prediction", prediction.zero_terminal_snr
    assert markers == ({"v_pred": 0} if v else {}) | ({"ztsnr": 0} if zero else {})
    with safe_open(file, framework="pt") as opened:
        said = opened.metadata().get("modelspec.prediction_type")
    assert said == {"epsilon": None, "v_prediction": "v", "rectified_flow": "rectified_flow"}[prediction.type]
    if prediction.type != "rectified_flow":
        scheduler = DDIMScheduler.from_pretrained(folder, subfolder="scheduler")
        assert scheduler.config.prediction_type == prediction.type
        assert (float(scheduler.alphas_cumprod[-1]) < 1e-6) == zero


def test_other_tools_marks_are_read(tmp_path: Path, single_file: Path, folder: Path) -> None:
    marked = load_file(single_file) | {"v_pred": torch.tensor([])}
    save_file(marked, tmp_path / "key.safetensors")
    assert base_prediction(str(tmp_path / "key.safetensors")) == Prediction("v_prediction")
    save_file(load_file(single_file), tmp_path / "said.safetensors", metadata={"modelspec.prediction_type": "v"})
    assert base_prediction(str(tmp_path / "said.safetensors")) == Prediction("v_prediction")
    assert base_prediction(str(single_file)) == base_prediction(str(folder)) == base_prediction("tiny") == Prediction()
    (tmp_path / "scheduler").mkdir()
    config = {"prediction_type": "v_prediction", "rescale_betas_zero_snr": True}
    (tmp_path / "scheduler" / "scheduler_config.json").write_bytes(orjson.dumps(config))
    assert base_prediction(str(tmp_path)) == Prediction("v_prediction", zero_terminal_snr=True)


def options(prediction: PredictionType, *, zero: bool = False) -> TrainOptions:
    return TrainOptions(prediction_type=prediction, zero_terminal_snr=zero)


def test_training_a_v_model_on_noise_is_refused_and_says_what_to_set() -> None:
    zero = Prediction("v_prediction", zero_terminal_snr=True)
    expected = r'noob.safetensors: .*Set prediction_type = "v_prediction", zero_terminal_snr = true'
    with pytest.raises(ConfigError, match=expected):
        check_prediction("/models/noob.safetensors", zero, options("epsilon"))
    assert check_prediction("noob.safetensors", zero, options("v_prediction", zero=True)) is None


@pytest.mark.parametrize(
    ("base", "wanted"),
    [
        (Prediction(), options("v_prediction")),
        (Prediction(), options("rectified_flow")),
        (Prediction("v_prediction", zero_terminal_snr=True), options("v_prediction")),
    ],
)
def test_teaching_a_model_another_prediction_is_allowed_and_said(base: Prediction, wanted: TrainOptions) -> None:
    warning = check_prediction("base.safetensors", base, wanted)
    assert warning is not None and "has to learn that anew" in warning and str(base) in warning
