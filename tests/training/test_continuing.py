"""A run that goes on: from a copied base model, a state of the first version, with more steps than were planned."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import orjson
import pytest
import torch

from sdxl_core.config import TrainConfig
from sdxl_core.models import dated_fingerprint, load_models, save_single_file
from sdxl_core.training.continuing import schedule_warning
from sdxl_core.training.state import read_generation

Configure = Callable[..., TrainConfig]
Train = Callable[..., bool]
NUM_STEPS = 6  # an epoch of the small cache


def test_a_copied_base_model_is_the_same_one(
    config: Configure, train: Train, tmp_path: Path, as_written_before: Callable[[Path, list[float]], dict[str, Any]]
) -> None:
    base, copy = tmp_path / "base.safetensors", tmp_path / "copy.safetensors"
    save_single_file(base, load_models("tiny", dtype=torch.float16), precision="fp16", metadata={})
    run = config(base_model=str(base), max_train_steps=1)
    assert train(run)
    shutil.copyfile(base, copy)
    os.utime(copy, ns=(10**18, 10**18))
    assert train(run.model_copy(update={"base_model": str(copy), "max_train_steps": 2}))

    undisturbed = run.model_copy(update={"out": tmp_path / "undisturbed", "max_train_steps": 8})
    assert train(undisturbed)
    state = run.out / "state" / "step-00000002"
    losses = np.fromfile(run.out / "state" / "losses.f64")
    manifest = as_written_before(state, losses.tolist())
    manifest["settings"]["base_model"] = dated_fingerprint(str(base))
    (state / "manifest.json").write_bytes(orjson.dumps(manifest))
    (run.out / "state" / "losses.f64").unlink()
    assert train(run.model_copy(update={"max_train_steps": 8})), "a state of the first version goes on"
    newest = [read_generation(each.out / "state" / "step-00000008").scalars for each in (run, undisturbed)]
    assert newest[0] == newest[1], "avr_loss, over an epoch of 6 steps, is what it would have been"


@pytest.mark.parametrize(
    ("scheduler", "longer", "words"),
    [
        ("cosine", {"max_train_steps": 4}, "max_train_steps: the saved run was to have 2 steps, this one has 4"),
        ("cosine", {"max_train_steps": 4}, "at step 2, where it had ended, the rates go from 0% to 50%"),
        ("linear", {"max_train_epochs": 1}, "max_train_epochs: the saved run was to have 2 steps, this one has 6"),
        ("cosine", {"max_train_steps": 2}, None),
        ("constant", {"max_train_steps": 4}, None),
    ],
)
def test_more_steps_than_were_planned_say_what_the_rates_do(
    config: Configure, train: Train, scheduler: str, longer: dict[str, int], words: str | None
) -> None:
    run = config(max_train_steps=2, lr_scheduler=scheduler, freeze=["unet.down_blocks.*", "unet.up_blocks.*"])
    assert schedule_warning(run, steps_per_epoch=NUM_STEPS) is None, "nothing is saved"
    assert train(run)
    found = schedule_warning(run.model_copy(update=longer), steps_per_epoch=NUM_STEPS)
    assert (found is None) if words is None else (found is not None and words in found and "\n" not in found)
