"""What cannot be right is told in one paragraph before a training process starts."""

import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import orjson
import pytest
import torch
from safetensors.torch import load_file, save_file

from sdxl_core.config import TrainConfig
from sdxl_core.errors import CheckpointError, ConfigError, DataError, DiskFullError, SdxlFlowsError
from sdxl_core.models import load_models, save_single_file
from sdxl_core.training import disk_guard
from sdxl_core.training.launch import launch_training
from sdxl_core.training.preflight import check_prompts

Configure = Callable[..., TrainConfig]
MakeLatents = Callable[..., tuple[Path, Path]]


@pytest.fixture(scope="module")
def base_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("base") / "base.safetensors"
    save_single_file(path, load_models("tiny", dtype=torch.float16), precision="fp16", metadata={})
    return path


def refusal(config: TrainConfig, kind: type[SdxlFlowsError]) -> str:
    with pytest.raises(kind) as error:
        launch_training(config)
    assert not os.path.exists(config.out / "train.log"), "no process was started"
    assert "\n" not in str(error.value)
    return str(error.value)


def rewrite(latents: Path, change: Callable[[dict[str, Any]], None]) -> None:
    for path in latents.glob("*.npz"):
        arrays = dict(np.load(path))
        change(arrays)
        np.savez(path, **arrays)


def test_another_architecture_is_named(config: Configure, tmp_path: Path) -> None:
    for key, name in (("cond_stage_model.transformer.a", "Stable Diffusion 1.x"), ("joint_blocks.0.w", "Diffusion 3")):
        save_file({f"model.diffusion_model.{key}": torch.zeros(2), key: torch.zeros(2)}, tmp_path / "m.safetensors")
        message = refusal(config(base_model=str(tmp_path / "m.safetensors")), CheckpointError)
        assert "not an SDXL checkpoint; it looks like" in message and name in message


def test_a_cut_or_incomplete_base_model_is_told(config: Configure, tmp_path: Path, base_model: Path) -> None:
    data = base_model.read_bytes()
    (tmp_path / "cut.safetensors").write_bytes(data[:-10])
    assert "cut short" in refusal(config(base_model=str(tmp_path / "cut.safetensors")), CheckpointError)
    state = load_file(base_model)
    del state["model.diffusion_model.out.2.weight"]
    save_file(state, tmp_path / "missing.safetensors")
    message = refusal(config(base_model=str(tmp_path / "missing.safetensors")), CheckpointError)
    assert "1 missing (model.diffusion_model.out.2.weight)" in message


def test_latents_of_another_size_or_vae_are_told(config: Configure, make_latents: MakeLatents, tmp_path: Path) -> None:
    metadata, latents = make_latents(tmp_path / "size", num_samples=4)
    entries = orjson.loads(metadata.read_bytes())
    entries["pic01"]["train_resolution"] = [64, 128]
    metadata.write_bytes(orjson.dumps(entries))
    message = refusal(config(metadata=metadata, latents=latents), DataError)
    assert "the latents of 'pic01' are (4, 8, 16)" in message and "its bucket is 64x128" in message


def test_latents_that_are_scaled_already_are_told(config: Configure, make_latents: MakeLatents, tmp_path: Path) -> None:
    metadata, latents = make_latents(tmp_path / "scaled", num_samples=4)
    rewrite(latents, lambda arrays: arrays.update(latents=arrays["latents"] * np.float32(0.13025)))
    message = refusal(config(metadata=metadata, latents=latents), DataError)
    assert "standard deviation of 0.5" in message and "scaling factor (0.13025)" in message


def test_latents_with_other_channels_are_told(config: Configure, make_latents: MakeLatents, tmp_path: Path) -> None:
    metadata, latents = make_latents(tmp_path / "flux", num_samples=4)
    rewrite(latents, lambda arrays: arrays.update(latents=np.repeat(arrays["latents"], 4, axis=0)))
    assert "(16, 8, 8)" in refusal(config(metadata=metadata, latents=latents), DataError)


def test_a_damaged_latent_file_is_named(config: Configure, make_latents: MakeLatents, tmp_path: Path) -> None:
    metadata, latents = make_latents(tmp_path / "torn", num_samples=4)
    (latents / "pic02.npz").write_bytes((latents / "pic02.npz").read_bytes()[:-40])
    assert "pic02.npz" in refusal(config(metadata=metadata, latents=latents), DataError)


def test_an_empty_metadata_file_is_told(config: Configure, tmp_path: Path) -> None:
    (tmp_path / "meta_lat.json").write_text("{}")
    assert "holds no picture" in refusal(config(metadata=tmp_path / "meta_lat.json"), DataError)


def test_metadata_that_is_torn_is_told_before_a_process_starts(config: Configure, tmp_path: Path) -> None:
    whole = config().metadata.read_bytes()
    for kept in (0, 200, len(whole) - 1):
        (tmp_path / "meta_lat.json").write_bytes(whole[:kept])
        assert "meta_lat.json: not valid JSON" in refusal(config(metadata=tmp_path / "meta_lat.json"), DataError)


def test_a_prompt_that_is_too_long_is_told(config: Configure) -> None:
    message = refusal(config(sample_prompts=["a boat", "sea, " * 60]), ConfigError)
    assert "prompt 2" in message and "120 tokens" in message


def test_brackets_and_weights_of_a_prompt_are_no_tokens(config: Configure) -> None:
    """75 words with a weight each fill the 75 places; read as plain text they are five times as many."""
    prompt = " ".join(["(sea:1.2)"] * 75)
    check_prompts(config(sample_prompts=[prompt], weighted_captions=True))
    with pytest.raises(ConfigError, match="has 76 tokens"):
        check_prompts(config(sample_prompts=[prompt + " sea"], weighted_captions=True))
    with pytest.raises(ConfigError, match=r"has \d{3} tokens"):
        check_prompts(config(sample_prompts=[prompt]))


def test_no_permission_to_write_is_told(config: Configure, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import tempfile

    def refused(**_: Any) -> tuple[int, str]:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(tempfile, "mkstemp", refused)  # tests may run as root, whom no permission stops
    assert "cannot be written (Permission denied)" in refusal(config(), DataError)
    (tmp_path / "file").write_text("")
    monkeypatch.undo()
    assert "this is a file" in refusal(config(out=tmp_path / "file"), ConfigError)


def test_a_disk_that_cannot_hold_two_states_is_told(config: Configure, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = disk_guard.shutil.disk_usage("/")
    monkeypatch.setattr(disk_guard.shutil, "disk_usage", lambda path: usage._replace(free=20_000_000))
    message = refusal(config(max_train_steps=1), DiskFullError)
    expected = r"needs [\d,]+ bytes.*2 resumable states of [\d,]+ bytes.*keep_states = 2; a new one.*1 model file of"
    assert re.search(expected, message) and "20,000,000 bytes (0.0 GB) are free" in message


@pytest.mark.parametrize("name", ["file/run", "x" * 300, "/proc/run"])
def test_an_out_folder_that_cannot_be_made_is_told(config: Configure, tmp_path: Path, name: str) -> None:
    (tmp_path / "file").write_text("")
    assert "cannot be made (" in refusal(config(out=tmp_path / name), DataError)
