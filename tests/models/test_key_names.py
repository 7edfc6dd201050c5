"""Names of the single-file layout: diffusers' own conversion and the keys of the official checkpoint are the truth."""

from __future__ import annotations

import gzip
from pathlib import Path

import orjson
import pytest
import torch
from diffusers.loaders import single_file_utils as reference
from torch import Tensor

from sdxl_core.models import SdxlModels, component_config
from sdxl_core.models.key_names import (
    CLIP_G_PREFIX,
    CLIP_L_PREFIX,
    LOGIT_SCALE,
    folder_names,
    from_original,
    module_names,
    to_original,
    vae_file_keys,
)
from sdxl_core.models.load import _new_module, _shapes
from sdxl_core.models.presets import MODEL_COMPONENTS, PRESETS, Component, Preset

GOLDEN = Path(__file__).parents[1] / "golden" / "sdxl_single_file_keys.json.gz"


def random_state(part: Component, preset: Preset) -> dict[str, Tensor]:
    """Every element is another number, so that no swap, slice or transposition goes unseen. Meta at full size."""
    state, start = {}, 0
    for key, shape in _shapes(part, preset).items():
        if preset == "sdxl":
            state[key] = torch.empty(shape, device="meta")
        else:
            size = torch.Size(shape).numel()
            state[key] = torch.arange(start, start + size, dtype=torch.int32).view(shape)
            start += size
    return state


def diffusers_conversion(part: Component, original: dict[str, Tensor], preset: Preset) -> dict[str, Tensor]:
    config = component_config(preset, part)
    if part == "unet":
        return reference.convert_ldm_unet_checkpoint(dict(original), config)
    if part == "vae":
        return reference.convert_ldm_vae_checkpoint(dict(original), config)
    if part == "text_encoder":
        return reference.convert_ldm_clip_checkpoint(dict(original))
    with torch.device("meta"):
        module = _new_module(part, preset)
    return reference.convert_open_clip_checkpoint(module, dict(original), prefix=CLIP_G_PREFIX)


def assert_same(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> None:
    assert sorted(ours) == sorted(theirs)
    for key, tensor in ours.items():
        assert tensor.shape == theirs[key].shape, key
        assert tensor.is_meta or torch.equal(tensor, theirs[key]), key


def test_the_official_checkpoint_has_exactly_our_names_and_shapes() -> None:
    golden = {key: tuple(shape) for key, shape in orjson.loads(gzip.decompress(GOLDEN.read_bytes())).items()}
    ours: dict[str, tuple[int, ...]] = {LOGIT_SCALE: ()}
    for part in MODEL_COMPONENTS:
        original = to_original(part, random_state(part, "sdxl"), "sdxl")
        ours |= {key: tuple(tensor.shape) for key, tensor in original.items()}
    assert len(golden) == 2514
    assert ours == golden


@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize("part", MODEL_COMPONENTS)
def test_diffusers_reads_what_we_write(part: Component, preset: Preset) -> None:
    state = random_state(part, preset)
    theirs = diffusers_conversion(part, to_original(part, state, preset), preset)
    assert_same(state, folder_names(part, theirs))


@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize("part", MODEL_COMPONENTS)
def test_reading_agrees_with_diffusers_and_undoes_writing(part: Component, preset: Preset) -> None:
    original = to_original(part, random_state(part, preset), preset)
    ours = from_original(part, original, preset, _shapes(part, preset))
    assert_same(ours, folder_names(part, diffusers_conversion(part, original, preset)))
    assert_same(to_original(part, ours, preset), original)


def test_the_projection_of_bigg_is_transposed_between_the_layouts() -> None:
    """pooled = x @ P in Stability's file; torch's Linear computes x @ W.T, so W = P.T."""
    state = random_state("text_encoder_2", "tiny")
    original = to_original("text_encoder_2", state, "tiny")
    assert torch.equal(original[CLIP_G_PREFIX + "text_projection"], state["text_projection.weight"].T)


@pytest.mark.parametrize("part", ["text_encoder", "text_encoder_2"])
def test_a_text_encoder_keeps_its_names_on_disk_whatever_its_module_calls_them(
    part: Component, tiny: SdxlModels
) -> None:
    in_memory = getattr(tiny, part).state_dict()
    on_disk = folder_names(part, in_memory)
    assert all(key.startswith(("text_model.", "text_projection.")) for key in on_disk)
    assert folder_names(part, on_disk) == on_disk
    assert module_names(on_disk, in_memory).keys() == in_memory.keys()
    assert module_names(in_memory, in_memory).keys() == in_memory.keys()


def test_position_ids_are_left_out() -> None:
    ids = torch.arange(77)[None]
    assert (
        folder_names("text_encoder", {"text_model.embeddings.position_ids": ids, "embeddings.position_ids": ids}) == {}
    )
    original = {CLIP_L_PREFIX + "text_model.embeddings.position_ids": ids}
    assert from_original("text_encoder", original, "tiny", _shapes("text_encoder", "tiny")) == {}


@pytest.mark.parametrize("prefix", ["first_stage_model.", ""])
def test_a_vae_is_found_under_ldm_names_with_and_without_prefix(prefix: str) -> None:
    state = random_state("vae", "tiny")
    file = [prefix + key.removeprefix("first_stage_model.") for key in to_original("vae", state, "tiny")]
    assert sorted(vae_file_keys(file, "tiny", state)) == sorted(state)
    assert sorted(vae_file_keys(file, "tiny", state).values()) == sorted(file)


def test_a_vae_is_found_under_diffusers_old_attention_names() -> None:
    state = random_state("vae", "tiny")
    old = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
    file = list(state)
    for new_name, old_name in old.items():
        file = [key.replace(f".{new_name}.", f".{old_name}.") for key in file]
    assert any(".proj_attn." in key for key in file)
    assert sorted(vae_file_keys(file, "tiny", state)) == sorted(state)
