"""Conditioning agrees with diffusers' own pipeline for the same weights."""

from __future__ import annotations

from typing import Any, ClassVar

import pytest
import torch
from diffusers import EulerDiscreteScheduler, StableDiffusionXLPipeline
from torch import Tensor

from sdxl_core.models import SdxlModels, TokenIds, component_config, encode_prompts, load_models, time_ids, tokenize
from sdxl_core.training.denoiser import Denoiser

CAPTIONS = ["", "a photo of an astronaut riding a horse", "1girl, solo, " * 60, "!!!", "astolfo_(fate), pink hair"]
BOS, EOS = 49406, 49407


class Tokens:
    """Gives diffusers our token ids in place of the tokenizers it would fetch from a hub."""

    model_max_length = 77
    added_tokens_encoder: ClassVar[dict[str, int]] = {}

    def __init__(self, field: str) -> None:
        self.field = field

    def __call__(self, prompt: list[str], **_: Any) -> Any:
        ids: Tensor = getattr(tokenize(prompt, max_token_length=75), self.field)[:, 0]
        return type("Encoded", (), {"input_ids": ids})

    def tokenize(self, prompt: str) -> list[str]:
        return []

    def batch_decode(self, ids: Tensor) -> list[str]:
        return [""] * len(ids)


@pytest.fixture(scope="module")
def pipeline(tiny: SdxlModels) -> StableDiffusionXLPipeline:
    scheduler = {k: v for k, v in component_config("tiny", "scheduler").items() if k != "skip_prk_steps"}
    return StableDiffusionXLPipeline(
        vae=tiny.vae,
        text_encoder=tiny.text_encoder,
        text_encoder_2=tiny.text_encoder_2,
        tokenizer=Tokens("clip_l"),
        tokenizer_2=Tokens("clip_g"),
        unet=tiny.unet,
        scheduler=EulerDiscreteScheduler.from_config(scheduler),
        add_watermarker=False,
    )


@torch.no_grad()
def test_prompt_embeds_match_diffusers(pipeline: StableDiffusionXLPipeline, tiny: SdxlModels) -> None:
    theirs, _, pooled_theirs, _ = pipeline.encode_prompt(CAPTIONS, do_classifier_free_guidance=False, device="cpu")
    ours, pooled = encode_prompts(tiny.text_encoder, tiny.text_encoder_2, tokenize(CAPTIONS, max_token_length=75))
    assert ours.shape == (len(CAPTIONS), 77, 64)
    assert pooled.shape == (len(CAPTIONS), 32)
    assert torch.equal(ours, theirs)
    torch.testing.assert_close(pooled, pooled_theirs, rtol=1e-6, atol=1e-7)


def test_time_ids_match_diffusers(pipeline: StableDiffusionXLPipeline) -> None:
    sizes = {"original_size": (1000, 700), "crop": (3, 96), "target_size": (1216, 832)}
    theirs = pipeline._get_add_time_ids(*sizes.values(), torch.float32, text_encoder_projection_dim=32)
    ours = time_ids(
        original_size=torch.tensor([[1000, 700]] * 2),
        crop_top_left=torch.tensor([[3, 96]] * 2),
        target_size=torch.tensor([[1216, 832]] * 2),
    )
    assert ours.dtype == torch.float32
    assert torch.equal(ours, theirs.expand(2, 6))


@torch.no_grad()
def test_the_trainers_forward_pass_is_the_pipelines(pipeline: StableDiffusionXLPipeline, tiny: SdxlModels) -> None:
    """Text, sizes and noisy latents to a prediction: as StableDiffusionXLPipeline.__call__ puts them together."""
    captions = ["a boat", "1girl, solo, blue hair"]
    noisy = torch.randn(2, 4, 8, 12, generator=torch.Generator().manual_seed(0))
    timesteps = torch.tensor([7, 903])
    embeds, _, pooled, _ = pipeline.encode_prompt(captions, do_classifier_free_guidance=False, device="cpu")
    ids = pipeline._get_add_time_ids((640, 960), (0, 16), (64, 96), torch.float32, text_encoder_projection_dim=32)
    theirs = pipeline.unet(
        noisy, timesteps, encoder_hidden_states=embeds,
        added_cond_kwargs={"text_embeds": pooled, "time_ids": ids.expand(2, 6)},
    ).sample  # fmt: skip
    sizes = [torch.tensor([size] * 2) for size in ((640, 960), (0, 16), (64, 96))]
    tokens = tokenize(captions, max_token_length=75)
    denoiser = Denoiser(tiny.unet, tiny.text_encoder, tiny.text_encoder_2)
    ours = denoiser(
        noisy, timesteps, tokens.clip_l, tokens.clip_g,
        time_ids(original_size=sizes[0], crop_top_left=sizes[1], target_size=sizes[2]),
    )  # fmt: skip
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)


def one_caption(ids: list[int], num_chunks: int) -> TokenIds:
    """The same ids for both encoders, padded with EOS."""
    flat = torch.tensor(ids + [EOS] * (num_chunks * 77 - len(ids))).view(1, num_chunks, 77)
    return TokenIds(clip_l=flat, clip_g=flat)


@torch.no_grad()
@pytest.mark.parametrize(("max_token_length", "num_states"), [(150, 152), (225, 227)])
def test_long_captions_are_encoded_chunk_by_chunk(tiny: SdxlModels, max_token_length: Any, num_states: int) -> None:
    captions = ["cat", "blue hair, " * 90]
    tokens = tokenize(captions, max_token_length=max_token_length)
    ours, pooled = encode_prompts(tiny.text_encoder, tiny.text_encoder_2, tokens)
    assert ours.shape == (2, num_states, 64)
    chunks = [
        encode_prompts(
            tiny.text_encoder,
            tiny.text_encoder_2,
            TokenIds(clip_l=tokens.clip_l[:, i : i + 1], clip_g=tokens.clip_g[:, i : i + 1]),
        )
        for i in range(max_token_length // 75)
    ]
    states = [embeds for embeds, _ in chunks]
    expected = torch.cat([states[0][:, :1], *(state[:, 1:-1] for state in states), states[-1][:, -1:]], dim=1)
    torch.testing.assert_close(ours, expected, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(pooled, chunks[0][1], rtol=1e-5, atol=1e-6)


@torch.no_grad()
def test_pooling_reads_the_first_end_mark_of_the_first_chunk(tiny: SdxlModels) -> None:
    """What follows the first end mark cannot be seen by it (attention is causal), so it must not matter."""
    short = [BOS, 320, 2368, EOS]
    pooled = [
        encode_prompts(tiny.text_encoder, tiny.text_encoder_2, one_caption(ids, 1))[1]
        for ids in (short, [*short, 500, 600], [BOS, 320, EOS])
    ]
    torch.testing.assert_close(pooled[0], pooled[1])
    assert not torch.allclose(pooled[0], pooled[2])


def test_gradients_reach_both_encoders_but_not_clip_ls_last_layer() -> None:
    models = load_models("tiny", parts=("text_encoder", "text_encoder_2"), dtype=torch.float32)
    embeds, pooled = encode_prompts(
        models.text_encoder, models.text_encoder_2, tokenize(CAPTIONS[:2], max_token_length=75)
    )
    (embeds.square().sum() + pooled.square().sum()).backward()
    without = {name for name, p in models.text_encoder.named_parameters() if p.grad is None or not p.grad.any()}
    assert without
    assert all(".layers.2." in f".{name}" or "final_layer_norm" in name for name in without)
    key_biases = {name for name, _ in models.text_encoder_2.named_parameters() if name.endswith("k_proj.bias")}
    assert {
        name for name, p in models.text_encoder_2.named_parameters() if p.grad is None or not p.grad.any()
    } <= key_biases


@torch.no_grad()
def test_frozen_bf16_encoders_work_beside_float32_ones_under_autocast() -> None:
    """A trained encoder holds float32 while the frozen one holds bf16."""
    first = load_models("tiny", parts=("text_encoder",), dtype=torch.bfloat16).text_encoder
    second = load_models("tiny", parts=("text_encoder_2",), dtype=torch.float32).text_encoder_2
    tokens = tokenize(["cat"], max_token_length=75)
    exact = encode_prompts(first.float(), second, tokens)
    with torch.autocast("cpu", torch.bfloat16):
        ours = encode_prompts(first.bfloat16(), second, tokens)
    for got, expected in zip(ours, exact, strict=True):
        torch.testing.assert_close(got.float(), expected, rtol=0.05, atol=0.05)


def test_meta_encoders_give_shapes() -> None:
    models = load_models("tiny", parts=("text_encoder", "text_encoder_2"), dtype=torch.bfloat16)
    embeds, pooled = encode_prompts(
        models.text_encoder.to("meta"),
        models.text_encoder_2.to("meta"),
        tokenize(["cat", "dog"], max_token_length=150),
    )
    assert embeds.shape == (2, 152, 64)
    assert pooled.shape == (2, 32)
    assert embeds.is_meta
    assert pooled.is_meta
