"""What is written is what other tools read."""

from __future__ import annotations

from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderKL, EulerDiscreteScheduler, UNet2DConditionModel
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import CLIPTextModel, CLIPTextModelWithProjection

from sdxl_core.errors import CheckpointError, ConfigError
from sdxl_core.files import sha256_file
from sdxl_core.models import SdxlModels, load_models, modelspec_metadata, save_diffusers_folder, save_single_file
from sdxl_core.models.key_names import LOGIT_SCALE
from sdxl_core.models.load import MODEL_COMPONENTS
from sdxl_core.models.single_file import DTYPES, Precision

CLASSES = {
    "unet": UNet2DConditionModel,
    "text_encoder": CLIPTextModel,
    "text_encoder_2": CLIPTextModelWithProjection,
    "vae": AutoencoderKL,
}


def assert_same_module(ours: nn.Module, theirs: nn.Module) -> None:
    first, second = ours.state_dict(), theirs.state_dict()
    assert first.keys() == second.keys()
    for key, tensor in first.items():
        assert tensor.dtype == second[key].dtype, key
        assert torch.equal(tensor, second[key]), key


@pytest.mark.parametrize("precision", ["fp16", "bf16", "fp32"])
def test_a_file_holds_the_model_in_its_precision(tmp_path: Path, tiny: SdxlModels, precision: Precision) -> None:
    path = tmp_path / "new folder" / "m.safetensors"
    metadata = modelspec_metadata(title="ünï", date=datetime(2026, 11, 22, 13, 5, tzinfo=UTC))
    ref = save_single_file(path, tiny, precision=precision, metadata=metadata)
    with safe_open(path, framework="pt") as file:
        assert file.metadata() == {"format": "pt", **metadata}
    assert {tensor.dtype for tensor in load_file(path).values()} == {DTYPES[precision]}
    assert (ref.path, ref.sha256, ref.num_bytes) == (path, sha256_file(path), path.stat().st_size)
    again = load_models(str(path), dtype=DTYPES[precision])
    for part in MODEL_COMPONENTS:
        expected = {key: t.to(DTYPES[precision]) for key, t in getattr(tiny, part).state_dict().items()}
        found = getattr(again, part).state_dict()
        assert found.keys() == expected.keys()
        assert all(torch.equal(found[key], tensor) for key, tensor in expected.items())
    assert [p.name for p in path.parent.iterdir()] == [path.name]


def test_the_same_model_is_the_same_file(tmp_path: Path, tiny: SdxlModels) -> None:
    first, second = (
        save_single_file(tmp_path / name, tiny, precision="bf16", metadata={"a": "b"}) for name in ("1", "2")
    )
    assert first.sha256 == second.sha256


def test_the_layout_is_that_of_the_safetensors_library(tmp_path: Path, single_file: Path) -> None:
    """Aligned header, then the tensors without gaps: only their order differs from the library's own writer."""
    theirs = tmp_path / "theirs.safetensors"
    state = load_file(single_file)
    save_file(state, theirs, metadata={"format": "pt"})
    sizes = []
    for path in (single_file, theirs):
        header_bytes = int.from_bytes(path.read_bytes()[:8], "little")
        assert header_bytes % 8 == 0
        sizes.append(path.stat().st_size - 8 - header_bytes)
    assert sizes == [sum(tensor.nbytes for tensor in state.values())] * 2


def test_modelspec_names_the_architecture_and_the_date() -> None:
    metadata = modelspec_metadata(title="t", date=datetime(2026, 11, 22, 13, 5, 7, tzinfo=UTC))
    assert metadata["modelspec.architecture"] == "stable-diffusion-xl-v1-base"
    assert metadata["modelspec.date"] == "2026-11-22T13:05:07"
    assert metadata["modelspec.prediction_type"] == "epsilon"
    assert all(isinstance(value, str) for value in metadata.values())


def test_logit_scale_is_kept(tmp_path: Path, single_file: Path) -> None:
    scale = torch.tensor(4.6055, dtype=torch.float32)
    path = tmp_path / "with_scale.safetensors"
    save_file({**load_file(single_file), LOGIT_SCALE: scale}, path)
    models = load_models(str(path), dtype=torch.float32)
    save_single_file(tmp_path / "again.safetensors", models, precision="fp32", metadata={})
    assert torch.equal(load_file(tmp_path / "again.safetensors")[LOGIT_SCALE], scale)
    assert LOGIT_SCALE not in load_file(single_file)


def with_unet_value(tiny: SdxlModels, value: float) -> SdxlModels:
    unet = load_models("tiny", parts=("unet",), dtype=torch.float32).unet
    with torch.no_grad():
        unet.conv_out.weight[1, 2, 1, 1] = value
    return replace(tiny, unet=unet)


@pytest.mark.parametrize(
    ("value", "precision", "advice"),
    [
        (float("nan"), "fp32", "diverged"),
        (float("inf"), "bf16", "diverged"),
        (float("-inf"), "fp16", "diverged"),
        (float("nan"), "fp16", "diverged"),
        (-70_000.0, "fp16", "bf16 or fp32"),
    ],
)
def test_values_that_are_not_finite_are_refused(
    tmp_path: Path, tiny: SdxlModels, value: float, precision: Precision, advice: str
) -> None:
    path = tmp_path / "m.safetensors"
    path.write_bytes(b"an older checkpoint")
    models = with_unet_value(tiny, value)
    with pytest.raises(CheckpointError, match=rf"out\.2\.weight.*{advice}"):
        save_single_file(path, models, precision=precision, metadata={})
    assert path.read_bytes() == b"an older checkpoint"
    assert list(tmp_path.iterdir()) == [path]


def test_values_too_large_for_fp16_fit_into_bf16(tmp_path: Path, tiny: SdxlModels) -> None:
    save_single_file(tmp_path / "m", with_unet_value(tiny, 70_000.0), precision="bf16", metadata={})


def test_an_incomplete_model_is_refused(tmp_path: Path) -> None:
    models = load_models("tiny", parts=("unet",), dtype=torch.float32)
    with pytest.raises(ConfigError, match="text_encoder is not loaded"):
        save_single_file(tmp_path / "m", models, precision="fp16", metadata={})


@pytest.mark.parametrize("part", MODEL_COMPONENTS)
def test_diffusers_and_transformers_load_the_folder(part: str, folder: Path, tiny: SdxlModels) -> None:
    module, info = CLASSES[part].from_pretrained(
        folder / part, local_files_only=True, output_loading_info=True, torch_dtype=torch.float32
    )
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    assert_same_module(getattr(tiny, part), module)


def test_diffusers_loads_the_folders_scheduler(folder: Path) -> None:
    scheduler = EulerDiscreteScheduler.from_pretrained(folder / "scheduler", local_files_only=True)
    assert scheduler.config.beta_end == 0.012
    assert scheduler.config.timestep_spacing == "leading"


def test_a_folder_is_written_in_half_precision(tmp_path: Path, tiny: SdxlModels) -> None:
    save_diffusers_folder(tmp_path, tiny, precision="fp16")
    unet = UNet2DConditionModel.from_pretrained(tmp_path / "unet", local_files_only=True, torch_dtype=torch.float16)
    expected: dict[str, Tensor] = tiny.unet.state_dict()
    assert all(torch.equal(tensor, expected[key].half()) for key, tensor in unet.state_dict().items())


@pytest.mark.parametrize("part", ["unet", "vae"])
def test_diffusers_reads_the_single_file(part: str, single_file: Path, folder: Path, tiny: SdxlModels) -> None:
    module = CLASSES[part].from_single_file(
        str(single_file), config=str(folder), subfolder=part, local_files_only=True, torch_dtype=torch.float32
    )
    assert_same_module(getattr(tiny, part), module)
