"""Models from every container, and every wrong thing that people name instead of one."""

from __future__ import annotations

import shutil
import socket
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import orjson
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from sdxl_core.errors import CheckpointError, ConfigError
from sdxl_core.models import (
    SdxlModels,
    load_models,
    load_vae,
    model_fingerprint,
    save_diffusers_folder,
    save_single_file,
    vae_fingerprint,
)
from sdxl_core.models.key_names import folder_names, to_original
from sdxl_core.models.presets import MODEL_COMPONENTS, Component

State = dict[str, Tensor]


@pytest.fixture(autouse=True)
def no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise AssertionError("a network connection was tried")

    monkeypatch.setattr(socket.socket, "connect", refuse)


def assert_same_models(first: SdxlModels, second: SdxlModels) -> None:
    for part in MODEL_COMPONENTS:
        ours, theirs = getattr(first, part).state_dict(), getattr(second, part).state_dict()
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(ours[key], theirs[key]) for key in ours), part


def rewritten(source: Path, target: Path, change: Callable[[State], State]) -> Path:
    save_file(change(load_file(source)), target)
    return target


# --- tiny


def test_tiny_follows_from_its_seed(tiny: SdxlModels) -> None:
    torch.manual_seed(123)
    before = torch.random.get_rng_state()
    assert_same_models(tiny, load_models("tiny", dtype=torch.float32, seed=3))
    assert torch.equal(before, torch.random.get_rng_state())
    other = load_models("tiny", parts=("unet",), dtype=torch.float32, seed=4).unet
    assert not torch.equal(other.conv_in.weight, tiny.unet.conv_in.weight)


def test_parts_are_the_same_whichever_are_asked_for(tiny: SdxlModels) -> None:
    only = load_models("tiny", parts=("vae",), dtype=torch.float32, seed=3)
    assert only.unet is None
    assert only.text_encoder is None
    assert torch.equal(only.vae.encoder.conv_in.weight, tiny.vae.encoder.conv_in.weight)


def test_threads_that_load_at_once_get_the_same_weights(tiny: SdxlModels, single_file: Path) -> None:
    """As previews do while a model is written: torch's seed, and how accelerate makes modules, are every thread's."""

    def load(source: str) -> SdxlModels:
        return load_models(source, dtype=torch.float32, seed=3)

    with ThreadPoolExecutor(4) as pool:
        for models in pool.map(load, ["tiny", str(single_file)] * 3):
            assert_same_models(models, tiny)
    assert not torch.nn.Linear(1, 1).weight.is_meta


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_all_weights_have_the_asked_for_dtype(single_file: Path, dtype: torch.dtype) -> None:
    for models in (load_models("tiny", dtype=dtype), load_models(str(single_file), dtype=dtype)):
        for part in MODEL_COMPONENTS:
            module = getattr(models, part)
            assert {parameter.dtype for parameter in module.parameters()} == {dtype}
            assert not module.training
            assert not any(tensor.is_meta for tensor in (*module.parameters(), *module.buffers()))


def test_weights_may_stay_as_they_are(single_file: Path, tmp_path: Path) -> None:
    dtypes = [torch.float16, torch.bfloat16, torch.float32, torch.float8_e4m3fn]
    mixed = rewritten(
        single_file, tmp_path / "mixed.safetensors",
        lambda state: {key: value.to(dtypes[i % 4]) for i, (key, value) in enumerate(state.items())},
    )  # fmt: skip
    models = load_models(str(mixed), parts=("unet",), dtype=None)
    found = {parameter.dtype for parameter in models.unet.parameters()}
    assert found == {torch.float16, torch.bfloat16, torch.float32}
    expected = load_models(str(mixed), parts=("unet",), dtype=torch.float32).unet.state_dict()
    assert all(torch.equal(value.float(), expected[name]) for name, value in models.unet.state_dict().items())


def test_every_tiny_weight_of_the_unet_learns(tiny: SdxlModels) -> None:
    """Nothing is initialised so that the loss cannot reach it."""
    unet = load_models("tiny", parts=("unet",), dtype=torch.float32).unet
    generator = torch.Generator().manual_seed(0)
    draw = [torch.randn(shape, generator=generator) for shape in ((2, 4, 8, 8), (2, 77, 64), (2, 32))]
    conditions = {"text_embeds": draw[2], "time_ids": torch.full((2, 6), 64.0)}
    output = unet(draw[0], torch.tensor([10, 500]), encoder_hidden_states=draw[1], added_cond_kwargs=conditions).sample
    assert output.std() > 1e-3
    (output - torch.randn(output.shape, generator=generator)).square().mean().backward()
    assert [name for name, p in unet.named_parameters() if p.grad is None or not p.grad.any()] == []


# --- containers


def test_a_single_file_gives_the_model_back(single_file: Path, tiny: SdxlModels) -> None:
    models = load_models(str(single_file), dtype=torch.float32)
    assert models.preset == "tiny"
    assert models.logit_scale is None
    assert_same_models(models, tiny)


def test_a_diffusers_folder_gives_the_model_back(folder: Path, tiny: SdxlModels) -> None:
    assert_same_models(load_models(str(folder), dtype=torch.float32), tiny)


def test_a_folder_saved_by_the_libraries_themselves_loads(tmp_path: Path, tiny: SdxlModels) -> None:
    """transformers 5 saves CLIPTextModel without the `text_model.` that folders on disk carry."""
    for part in MODEL_COMPONENTS:
        getattr(tiny, part).save_pretrained(tmp_path / part)
    assert_same_models(load_models(str(tmp_path), dtype=torch.float32), tiny)


def test_a_sharded_folder_and_an_fp16_variant_load(tmp_path: Path, tiny: SdxlModels) -> None:
    for part in MODEL_COMPONENTS:
        getattr(tiny, part).save_pretrained(tmp_path / part)
    shutil.rmtree(tmp_path / "unet")
    tiny.unet.save_pretrained(tmp_path / "unet", max_shard_size="5MB")
    assert len(list((tmp_path / "unet").glob("*.safetensors"))) > 1
    vae = tmp_path / "vae" / "diffusion_pytorch_model.safetensors"
    vae.rename(vae.with_name("diffusion_pytorch_model.fp16.safetensors"))
    assert_same_models(load_models(str(tmp_path), dtype=torch.float32), tiny)
    next((tmp_path / "unet").glob("*00001-of*")).unlink()
    with pytest.raises(CheckpointError, match=r"00001-of.*is not there"):
        load_models(str(tmp_path), dtype=torch.float32)


def test_what_sdxl_does_not_use_may_be_in_the_file(tmp_path: Path, single_file: Path, tiny: SdxlModels) -> None:
    extra = {
        "conditioner.embedders.0.transformer.text_model.embeddings.position_ids": torch.arange(77)[None],
        "conditioner.embedders.0.transformer.text_projection.weight": torch.zeros(32, 32),
        "conditioner.embedders.1.model.logit_scale": torch.tensor(4.6),
        "denoiser.sigmas": torch.zeros(1000),
        "model_ema.decay": torch.tensor(0.9),
    }
    path = rewritten(single_file, tmp_path / "m.safetensors", lambda state: state | extra)
    models = load_models(str(path), dtype=torch.float32)
    assert models.logit_scale == torch.tensor(4.6)
    assert_same_models(models, tiny)


def test_loaded_weights_can_be_trained(single_file: Path) -> None:
    before = single_file.read_bytes()
    unet = load_models(str(single_file), parts=("unet",), dtype=torch.float32).unet
    with torch.no_grad():
        for parameter in unet.parameters():
            parameter.add_(1)
    assert all(parameter.requires_grad for parameter in unet.parameters())
    assert single_file.read_bytes() == before


# --- VAE containers


def vae_containers(tmp_path: Path, single_file: Path, folder: Path) -> dict[str, str]:
    whole = load_file(single_file)
    ldm = {key: t for key, t in whole.items() if key.startswith("first_stage_model.")}
    bare = {key.removeprefix("first_stage_model."): tensor for key, tensor in ldm.items()}
    linear = {key: t[:, :, 0, 0] if t.shape[2:] == (1, 1) and ".attn_1." in key else t for key, t in bare.items()}
    diffusers_keys = load_file(folder / "vae" / "diffusion_pytorch_model.safetensors")
    old = {
        key.replace(".to_q.", ".query.").replace(".to_k.", ".key.").replace(".to_v.", ".value.")
        .replace(".to_out.0.", ".proj_attn."): t[:, :, None, None] if ".to_" in key and t.ndim == 2 else t
        for key, t in diffusers_keys.items()
    }  # fmt: skip
    for name, state in {"ldm": ldm, "bare": bare, "linear": linear, "diffusers": diffusers_keys, "old": old}.items():
        save_file({key: tensor.contiguous() for key, tensor in state.items()}, tmp_path / f"{name}.safetensors")
    files = {name: str(tmp_path / f"{name}.safetensors") for name in ("ldm", "bare", "linear", "diffusers", "old")}
    return {"whole": str(single_file), "folder": str(folder), "vae folder": str(folder / "vae"), **files}


def test_the_same_vae_is_the_same_in_every_container(
    tmp_path: Path, single_file: Path, folder: Path, tiny: SdxlModels
) -> None:
    containers = vae_containers(tmp_path, single_file, folder)
    expected = tiny.vae.state_dict()
    for name, container in containers.items():
        state = load_vae(container, dtype=torch.float32).state_dict()
        assert state.keys() == expected.keys(), name
        assert all(torch.equal(state[key], expected[key]) for key in expected), name
    assert len({vae_fingerprint(container) for container in containers.values()}) == 1


def test_another_vae_or_precision_has_another_fingerprint(tmp_path: Path, single_file: Path, tiny: SdxlModels) -> None:
    def change(state: State) -> State:
        state["first_stage_model.decoder.conv_out.bias"][0] += 1e-3
        return state

    half = tmp_path / "half.safetensors"
    save_single_file(half, tiny, precision="fp16", metadata={})
    changed = rewritten(single_file, tmp_path / "changed.safetensors", change)
    assert len({vae_fingerprint(str(path)) for path in (single_file, half, changed)}) == 3


def test_a_fingerprint_reads_nothing_but_the_vae(tmp_path: Path, single_file: Path) -> None:
    def change(state: State) -> State:
        return {key: tensor + 1 if key.startswith("model.") else tensor for key, tensor in state.items()}

    path = rewritten(single_file, tmp_path / "m.safetensors", change)
    assert vae_fingerprint(str(path)) == vae_fingerprint(str(single_file))


def test_tinys_vae_is_always_the_same() -> None:
    assert vae_fingerprint("tiny") == vae_fingerprint("tiny")
    first, second = (load_vae("tiny", dtype=torch.float32).state_dict() for _ in range(2))
    assert all(torch.equal(first[key], second[key]) for key in first)
    base = load_models("tiny", parts=("vae",), dtype=torch.float32).vae.state_dict()
    assert all(torch.equal(first[key], base[key]) for key in first)


# --- identity


def test_a_base_model_is_known_again_and_a_change_is_seen(tmp_path: Path, tiny: SdxlModels) -> None:
    path, folder = tmp_path / "m.safetensors", tmp_path / "folder"
    save_single_file(path, tiny, precision="fp16", metadata={})
    save_diffusers_folder(folder, tiny, precision="fp16")
    before = {name: model_fingerprint(name) for name in ("tiny", str(path), str(folder))}
    assert len(set(before.values())) == 3
    assert before == {name: model_fingerprint(name) for name in before}
    (tmp_path / "copies").mkdir()
    (tmp_path / "copies" / "other name.safetensors").write_bytes(path.read_bytes())
    shutil.copytree(folder, tmp_path / "copies" / "folder", copy_function=shutil.copyfile)
    assert model_fingerprint(str(tmp_path / "copies" / "other name.safetensors")) == before[str(path)]
    assert model_fingerprint(str(tmp_path / "copies" / "folder")) == before[str(folder)]
    save_single_file(path, tiny, precision="fp16", metadata={"another": "file"})
    save_diffusers_folder(folder, tiny, precision="bf16")
    assert model_fingerprint(str(path)) != before[str(path)]
    assert model_fingerprint(str(folder)) != before[str(folder)]


@pytest.mark.parametrize("part", ["unet", "text_encoder", "text_encoder_2", "vae"])
def test_one_trained_tensor_makes_another_model(
    tmp_path: Path, tiny: SdxlModels, single_file: Path, part: Component
) -> None:
    """Header and size stay the same."""
    tensors = load_file(single_file)
    key = list(to_original(part, folder_names(part, getattr(tiny, part).state_dict()), "tiny"))[-1]
    tensors[key] = tensors[key] + 1e-3
    save_file(tensors, tmp_path / "one.safetensors", metadata={"format": "pt"})
    tensors[key] = tensors[key] + 1e-3
    save_file(tensors, tmp_path / "other.safetensors", metadata={"format": "pt"})
    one, other = (tmp_path / f"{name}.safetensors" for name in ("one", "other"))
    assert one.stat().st_size == other.stat().st_size
    assert model_fingerprint(str(one)) != model_fingerprint(str(other))


# --- what is not a model


def refused(base_model: Path | str) -> str:
    """The paragraph that a wrong base model is answered with; it names the file and fits one paragraph."""
    with pytest.raises((ConfigError, CheckpointError)) as caught:
        load_models(str(base_model), dtype=torch.float32)
    message = str(caught.value)
    assert str(base_model) in message
    assert "\n" not in message
    return message


@pytest.mark.parametrize("ask", [load_models, load_vae])
def test_a_missing_path_is_a_config_error(ask: Callable[..., Any], tmp_path: Path) -> None:
    for name in (str(tmp_path / "no.safetensors"), "stabilityai/stable-diffusion-xl-base-1.0"):
        with pytest.raises(ConfigError, match=r"no such file or folder.*nothing is downloaded"):
            ask(name, dtype=torch.float32)


def test_an_empty_file_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "m.safetensors"
    path.touch()
    assert "empty" in refused(path)


def test_a_pickle_is_refused_unopened(tmp_path: Path) -> None:
    for name, zipped in (("m.ckpt", True), ("renamed.safetensors", True), ("old.pt", False)):
        path = tmp_path / name
        torch.save({"state_dict": {}}, path, _use_new_zipfile_serialization=zipped)
        assert "Convert it to .safetensors" in refused(path)


def test_other_files_are_refused(tmp_path: Path) -> None:
    for content in (b"GIF89a" + bytes(100), b"<html><body>404</body></html>", b"\x01", b"{}" * 50):
        path = tmp_path / "m.safetensors"
        path.write_bytes(content)
        assert "not a .safetensors file" in refused(path)


@pytest.mark.parametrize("kept", [9, 100, 50_000, -1])
def test_a_file_cut_anywhere_is_refused(tmp_path: Path, single_file: Path, kept: int) -> None:
    path = tmp_path / "m.safetensors"
    path.write_bytes(single_file.read_bytes()[:kept])
    assert "cut short" in refused(path)
    with pytest.raises(CheckpointError, match="cut short"):
        load_vae(str(path), dtype=torch.float32)


def test_a_header_of_any_length_is_not_taken_for_a_pickle(tmp_path: Path) -> None:
    """A pickle begins with byte 0x80, and so does a safetensors file whose header is 128 bytes long."""
    path = tmp_path / "m.safetensors"
    for length in range(128):
        save_file({"emb_params": torch.zeros(1)}, path, metadata={"pad": "x" * length})
        if path.read_bytes()[0] == 0x80:
            break
    assert path.read_bytes()[0] == 0x80
    assert "textual inversion" in refused(path)


def sd1(_: State) -> State:
    return {
        "model.diffusion_model.input_blocks.0.0.weight": torch.zeros(320, 4, 3, 3),
        "cond_stage_model.transformer.text_model.final_layer_norm.weight": torch.zeros(768),
        "first_stage_model.encoder.conv_in.weight": torch.zeros(128, 3, 3, 3),
    }


def only(*prefixes: str) -> Callable[[State], State]:
    return lambda state: {key: tensor for key, tensor in state.items() if key.startswith(prefixes)}


def one(*keys: str) -> Callable[[State], State]:
    return lambda _: {key: torch.zeros(4, 4) for key in keys}


UNET, VAE, CLIP = "model.diffusion_model.", "first_stage_model.", "conditioner.embedders."


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (sd1, "Stable Diffusion 1.x"),
        (one(UNET + "input_blocks.0.0.weight", "cond_stage_model.model.ln_final.weight"), "Stable Diffusion 2.x"),
        (one(UNET + "joint_blocks.0.x_block.attn.qkv.weight"), "Stable Diffusion 3"),
        (one("double_blocks.0.img_attn.qkv.weight"), "Flux"),
        (one("lora_unet_down_blocks_0_attentions_0.lora_down.weight"), "a LoRA"),
        (one("unet.down_blocks.0.attn1.to_q.lora_A.weight"), "a LoRA"),
        (one("conditioner.embedders.0.model.ln_final.weight", UNET + "out.2.bias"), "SDXL's refiner"),
        (one("control_model.input_hint_block.0.weight"), "a ControlNet"),
        (one("down_blocks.0.resnets.0.conv1.weight", "conv_in.weight"), "a diffusers U-Net"),
        (one("text_model.final_layer_norm.weight"), "a text encoder"),
        (one("blk.0.weight"), "something else"),
        (only(VAE), "a VAE without"),
        (only(UNET), "a U-Net without text encoders and VAE"),
        (only(UNET, VAE), "an SDXL checkpoint without text encoder 1 and text encoder 2"),
        (only(UNET, CLIP), "an SDXL checkpoint without VAE"),
    ],
)
def test_another_model_is_named_for_what_it_is(
    tmp_path: Path, single_file: Path, change: Callable[[State], State], words: str
) -> None:
    assert f"looks like {words}" in (message := refused(rewritten(single_file, tmp_path / "m.safetensors", change)))
    assert "Name a" in message or "name a" in message


OUT = UNET + "out.2.weight"


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda state: {k: t for k, t in state.items() if k != OUT}, rf"1 missing ({OUT})"),
        (lambda state: state | {UNET + "new.weight": torch.zeros(2)}, f"1 unknown ({UNET}new.weight)"),
        (lambda state: state | {OUT: torch.zeros(3, 32, 3, 3)}, f"({OUT} is [3, 32, 3, 3] instead of [4, 32, 3, 3])"),
        (lambda state: {k: t for k, t in state.items() if "out_layers" not in k}, ", …)"),
        (lambda state: state | {VAE + "decoder.conv_out.bias": torch.zeros(4)}, "its vae are not"),
    ],
)
def test_damaged_tensors_are_listed_even_of_parts_that_were_not_asked_for(
    tmp_path: Path, single_file: Path, change: Callable[[State], State], words: str
) -> None:
    path = rewritten(single_file, tmp_path / "m.safetensors", change)
    with pytest.raises(CheckpointError) as caught:
        load_models(str(path), parts=("text_encoder",), dtype=torch.float32)
    assert words in str(caught.value)


def test_a_damaged_vae_has_no_fingerprint(tmp_path: Path, single_file: Path) -> None:
    path = rewritten(single_file, tmp_path / "m.safetensors", only(VAE + "encoder"))
    with pytest.raises(CheckpointError, match=r"vae.*missing"):
        vae_fingerprint(str(path))


@pytest.mark.parametrize("change", [sd1, one("lora_unet_x.alpha"), only(UNET), one("encoder.conv_in.weight")])
def test_what_holds_no_sdxl_vae_is_refused_as_one(
    tmp_path: Path, single_file: Path, change: Callable[[State], State]
) -> None:
    path = rewritten(single_file, tmp_path / "m.safetensors", change)
    with pytest.raises(CheckpointError, match="holds no VAE of SDXL; it looks like"):
        load_vae(str(path), dtype=torch.float32)


def test_wrong_folders_are_refused(tmp_path: Path, folder: Path) -> None:
    assert "there is no folder unet/" in refused(tmp_path)
    copy = Path(shutil.copytree(folder, tmp_path / "copy"))
    shutil.rmtree(copy / "text_encoder_2")
    assert "there is no folder text_encoder_2/" in refused(copy)
    copy = Path(shutil.copytree(folder, tmp_path / "bin"))
    (copy / "vae" / "diffusion_pytorch_model.safetensors").rename(copy / "vae" / "diffusion_pytorch_model.bin")
    with pytest.raises(CheckpointError, match=r"no \.safetensors weights"):
        load_models(str(copy), dtype=torch.float32)
    copy = Path(shutil.copytree(folder, tmp_path / "swapped"))
    shutil.rmtree(copy / "unet")
    shutil.copytree(copy / "vae", copy / "unet")
    with pytest.raises(CheckpointError, match="not SDXL's U-Net"):
        load_models(str(copy), dtype=torch.float32)


def test_a_vae_of_another_scaling_is_refused(tmp_path: Path, folder: Path) -> None:
    """Stable Diffusion 1's VAE has SDXL's names and shapes; only its config tells."""
    vae = Path(shutil.copytree(folder / "vae", tmp_path / "vae"))
    config = orjson.loads((vae / "config.json").read_bytes())
    (vae / "config.json").write_bytes(orjson.dumps(config | {"scaling_factor": 0.18215}))
    with pytest.raises(CheckpointError, match=r"scaling_factor 0\.18215"):
        load_vae(str(vae), dtype=torch.float32)
    (vae / "config.json").write_bytes(b"{")
    with pytest.raises(CheckpointError, match="not JSON"):
        load_vae(str(vae), dtype=torch.float32)
