"""The configs that ship with the package."""

from __future__ import annotations

import inspect

import pytest
import torch
from diffusers import AutoencoderKL, EulerDiscreteScheduler, UNet2DConditionModel

from sdxl_core.models import SdxlModels, component_config
from sdxl_core.models.load import _shapes
from sdxl_core.models.presets import MODEL_COMPONENTS, Component

# stabilityai/stable-diffusion-xl-base-1.0, wherever the official folder differs from diffusers' defaults
OFFICIAL = {
    "unet": {
        "addition_embed_type": "text_time",
        "addition_time_embed_dim": 256,
        "attention_head_dim": [5, 10, 20],
        "block_out_channels": [320, 640, 1280],
        "cross_attention_dim": 2048,
        "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"],
        "projection_class_embeddings_input_dim": 2816,
        "sample_size": 128,
        "transformer_layers_per_block": [1, 2, 10],
        "up_block_types": ["CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"],
        "use_linear_projection": True,
    },
    "vae": {
        "block_out_channels": [128, 256, 512, 512],
        "down_block_types": ["DownEncoderBlock2D"] * 4,
        "layers_per_block": 2,
        "sample_size": 1024,
        "scaling_factor": 0.13025,
        "up_block_types": ["UpDecoderBlock2D"] * 4,
    },
}
CLASSES = {"unet": UNet2DConditionModel, "vae": AutoencoderKL}


@pytest.mark.parametrize("part", ["unet", "vae"])
def test_sdxl_is_the_official_config(part: Component) -> None:
    config = component_config("sdxl", part)
    defaults = {name: p.default for name, p in inspect.signature(CLASSES[part].__init__).parameters.items()}
    differing = {
        name: value
        for name, value in config.items()
        if value != (list(defaults[name]) if isinstance(defaults[name], tuple) else defaults[name])
    }
    assert differing == OFFICIAL[part]


def test_the_noise_schedule_is_sdxls() -> None:
    scheduler = EulerDiscreteScheduler.from_config(
        {key: value for key, value in component_config("sdxl", "scheduler").items() if key != "skip_prk_steps"}
    )
    betas = torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float32) ** 2
    assert torch.equal(scheduler.betas, betas)
    assert scheduler.config.prediction_type == "epsilon"


@pytest.mark.parametrize("part", MODEL_COMPONENTS)
def test_tiny_has_sdxls_structure_in_other_shapes(part: Component) -> None:
    tiny, sdxl = component_config("tiny", part), component_config("sdxl", part)
    assert tiny.keys() == sdxl.keys()
    for name in ("down_block_types", "up_block_types", "mid_block_type", "latent_channels", "vocab_size", "hidden_act"):
        assert tiny.get(name) == sdxl.get(name)
    assert tiny.get("use_linear_projection") == sdxl.get("use_linear_projection")
    shared = _shapes(part, "tiny").keys() & _shapes(part, "sdxl").keys()
    assert any(_shapes(part, "tiny")[key] != _shapes(part, "sdxl")[key] for key in shared)


def test_tiny_conditioning_fits_its_unet(tiny: SdxlModels) -> None:
    config = component_config("tiny", "unet")
    pooled = component_config("tiny", "text_encoder_2")["projection_dim"]
    assert config["projection_class_embeddings_input_dim"] == pooled + 6 * config["addition_time_embed_dim"]
    assert config["cross_attention_dim"] == sum(
        component_config("tiny", part)["hidden_size"] for part in ("text_encoder", "text_encoder_2")
    )
    assert 1e6 < sum(parameter.numel() for parameter in tiny.unet.parameters()) < 4e6


def test_tiny_vae_shrinks_eightfold_to_four_channels(tiny: SdxlModels) -> None:
    with torch.no_grad():
        latents = tiny.vae.encode(torch.zeros(1, 3, 32, 48)).latent_dist.mean
    assert latents.shape == (1, 4, 4, 6)


def test_a_config_is_a_fresh_dict() -> None:
    component_config("tiny", "unet")["in_channels"] = 9
    assert component_config("tiny", "unet")["in_channels"] == 4
