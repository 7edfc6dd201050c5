"""A trained model as a diffusers folder, and what its metadata says."""

from collections.abc import Callable

import orjson
import torch
from safetensors import safe_open

from sdxl_core.config import TrainConfig
from sdxl_core.models import load_models
from sdxl_core.training.launch import launch_training
from sdxl_core.training.result import finished_result
from sdxl_core.training.training_set import read_training_set

Configure = Callable[..., TrainConfig]
Train = Callable[..., bool]


def test_a_diffusers_folder_holds_the_same_model(config: Configure, train: Train) -> None:
    shared = {"max_train_steps": 1, "modelspec": {"author": "me", "title": "Mine"}}
    one = config(**shared)
    assert train(one)
    other = config(**shared, save_model_as="diffusers", out=one.out / "other")
    assert train(other)
    file, folder = (run.out / "model" / name for run, name in ((one, "last.safetensors"), (other, "last")))
    models = [load_models(str(path), parts=("unet",), dtype=torch.float32) for path in (file, folder)]
    states = [model.unet.state_dict() for model in models]
    assert not [name for name in states[0] if not torch.equal(states[0][name], states[1][name])]
    with safe_open(file, framework="pt") as opened:
        told = opened.metadata()
    assert (told["modelspec.author"], told["modelspec.title"]) == ("me", "Mine")
    kept = orjson.loads((folder / "sdxl_flows.json").read_bytes())
    assert kept["sdxl_flows.dataset_digest"] == told["sdxl_flows.dataset_digest"] and kept["modelspec.author"] == "me"
    assert launch_training(other).file.path == folder, "finished: nothing is trained again"
    weights = folder / "vae" / "diffusion_pytorch_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"x")
    assert finished_result(other, read_training_set(other)) is None, "an altered model is made again"
