"""diffusers loads a whole folder of ours, offline, and computes what we compute."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DDIMScheduler, StableDiffusionXLPipeline
from transformers import CLIPTokenizer

from sdxl_core.config import TrainConfig
from sdxl_core.config.convert import ConvertModelConfig
from sdxl_core.models import Prediction, SdxlModels, encode_prompts, save_diffusers_folder, save_single_file, tokenize
from sdxl_core.models.convert import convert_model
from sdxl_core.models.pipeline_files import merges, vocabulary
from sdxl_core.models.tokenizer import token_ids
from sdxl_core.training.denoiser import Denoiser
from sdxl_core.training.previews import _denoise
from sdxl_core.training.prompts import Prompt
from sdxl_core.training.randomness import torch_generator

CAPTIONS = [
    "", "a  photo of\ta CAT", "1girl, solo, astolfo_(fate), pink hair", "it's 2024, they'll say \"no\" — ça, 猫 🐈",
    "long, " * 90,
]  # fmt: skip
KINDS = [Prediction(), Prediction("v_prediction"), Prediction("v_prediction", zero_terminal_snr=True)]


@pytest.fixture(autouse=True)
def no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    import socket

    def refuse(*_: Any) -> None:
        raise AssertionError("the network was asked")

    monkeypatch.setattr(socket.socket, "connect", refuse)


def pipeline_of(folder: Path) -> Any:
    return StableDiffusionXLPipeline.from_pretrained(folder, add_watermarker=False)


def test_the_shipped_vocabulary_is_clips() -> None:
    known = vocabulary()
    assert len(known) == 49408 and sorted(known.values()) == list(range(49408)) and len(merges()) == 48894
    assert (known["!"], known["!</w>"], known["cat</w>"], known["<|endoftext|>"]) == (0, 256, 2368, 49407)


@pytest.mark.parametrize(("name", "pad", "field"), [("tokenizer", 49407, "clip_l"), ("tokenizer_2", 0, "clip_g")])
def test_the_folders_tokenizers_give_our_tokens(folder: Path, name: str, pad: int, field: str) -> None:
    tokenizer = CLIPTokenizer.from_pretrained(folder / name)
    assert (tokenizer.pad_token_id, tokenizer.model_max_length) == (pad, 77)
    found = tokenizer(CAPTIONS, padding="max_length", truncation=True, max_length=77, return_tensors="pt").input_ids
    assert torch.equal(found, getattr(tokenize(CAPTIONS, max_token_length=75), field)[:, 0])
    assert tokenizer(CAPTIONS[2], add_special_tokens=False).input_ids == token_ids(CAPTIONS[2])


@pytest.mark.parametrize("prediction", KINDS, ids=str)
@torch.no_grad()
def test_diffusers_loads_the_folder_and_draws_what_we_draw(
    tmp_path: Path, tiny: SdxlModels, prediction: Prediction
) -> None:
    save_diffusers_folder(tmp_path, replace(tiny, prediction=prediction), precision="fp32")
    pipeline = pipeline_of(tmp_path)
    assert pipeline.scheduler.config.prediction_type == prediction.type
    assert bool(pipeline.scheduler.config.rescale_betas_zero_snr) == prediction.zero_terminal_snr
    theirs, _, pooled_theirs, _ = pipeline.encode_prompt(CAPTIONS, do_classifier_free_guidance=False, device="cpu")
    ours, pooled = encode_prompts(tiny.text_encoder, tiny.text_encoder_2, tokenize(CAPTIONS, max_token_length=75))
    assert torch.equal(ours, theirs)
    torch.testing.assert_close(pooled, pooled_theirs, rtol=1e-6, atol=1e-7)

    prompt = Prompt(
        text="a boat", negative="lowres", width_px=64, height_px=48, seed=5, guidance_scale=6.0, num_steps=3
    )
    config = TrainConfig(
        metadata=tmp_path / "m", latents=tmp_path, out=tmp_path / "out", base_model="tiny",
        prediction_type=prediction.type, zero_terminal_snr=prediction.zero_terminal_snr,
    )  # fmt: skip
    denoiser = Denoiser(unet=tiny.unet, text_encoder=tiny.text_encoder, text_encoder_2=tiny.text_encoder_2)
    factor = 2 ** (len(tiny.vae.config.block_out_channels) - 1)
    mine = _denoise(denoiser, config, prompt, number=0, factor=factor)
    shape = (1, 4, prompt.height_px // factor, prompt.width_px // factor)
    noise = torch.randn(shape, generator=torch_generator("preview", prompt.seed, 0))
    pipeline.scheduler = DDIMScheduler.from_config(pipeline.scheduler.config)
    pipeline.set_progress_bar_config(disable=True)
    drawn = pipeline(
        prompt.text, negative_prompt=prompt.negative, width=prompt.width_px, height=prompt.height_px, latents=noise,
        num_inference_steps=prompt.num_steps, guidance_scale=prompt.guidance_scale, output_type="latent",
    ).images  # fmt: skip
    torch.testing.assert_close(drawn, mine, rtol=1e-4, atol=1e-4)


def test_a_pipeline_saved_by_diffusers_comes_back_as_a_single_file(tmp_path: Path, single_file: Path) -> None:
    """Single file -> our folder -> diffusers' own save_pretrained -> single file: every tensor as it was."""
    from safetensors.torch import load_file

    convert_model(ConvertModelConfig(model=single_file, out=tmp_path / "ours", precision="fp32"))
    pipeline_of(tmp_path / "ours").save_pretrained(tmp_path / "theirs")
    back = tmp_path / "back.safetensors"
    convert_model(ConvertModelConfig(model=tmp_path / "theirs", out=back, precision="fp32"))
    one, other = load_file(single_file), load_file(back)
    assert one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)


def test_a_flow_is_loaded_with_its_own_scheduler(tmp_path: Path, tiny: SdxlModels) -> None:
    """diffusers' SDXL pipeline cannot draw from a flow by itself, but the folder says what it is."""
    save_diffusers_folder(tmp_path, replace(tiny, prediction=Prediction("rectified_flow")), precision="fp16")
    assert type(pipeline_of(tmp_path).scheduler).__name__ == "FlowMatchEulerDiscreteScheduler"


def test_single_files_load_as_pipelines_with_a_folder_as_config(tmp_path: Path, tiny: SdxlModels) -> None:
    save_single_file(tmp_path / "m.safetensors", tiny, precision="fp32", metadata={})
    save_diffusers_folder(tmp_path / "folder", tiny, precision="fp32")
    pipeline = StableDiffusionXLPipeline.from_single_file(
        str(tmp_path / "m.safetensors"), config=str(tmp_path / "folder"), local_files_only=True, add_watermarker=False
    )
    expected = tiny.unet.state_dict()
    assert all(torch.equal(tensor, expected[key]) for key, tensor in pipeline.unet.state_dict().items())
