"""Runs that meet bad steps, update weights within the backward pass, average them, and are interrupted all the time."""

import errno
import logging
import math
import re
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import orjson
import pytest
import torch
from accelerate.state import AcceleratorState
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor

from sdxl_core.config import TrainConfig
from sdxl_core.errors import ConfigError, DiskFullError, TrainingError
from sdxl_core.files import sha256_file
from sdxl_core.lineage.record import KEY
from sdxl_core.models import load_models
from sdxl_core.training import disk_guard, loop, saving, text_outputs
from sdxl_core.training.guard import WARM_UP_STEPS, Guard
from sdxl_core.training.processes import StopSignal
from sdxl_core.training.result import read_result
from sdxl_core.training.saving import Saver, SaveTimes
from sdxl_core.training.state import Snapshot, load_newest, read_generation
from sdxl_core.training.text_outputs import outputs_bytes
from sdxl_core.training.training_set import Sample, read_training_set

Configure = Callable[..., TrainConfig]
Train = Callable[..., bool]
SMALL: dict[str, Any] = {"freeze": ["unet.down_blocks.*", "unet.up_blocks.*", "unet.*embedding*"]}


def model(config: TrainConfig) -> dict[str, Tensor]:
    return load_file(config.out / "model" / "last.safetensors")


def assert_same(one: dict[str, Tensor], other: dict[str, Tensor]) -> None:
    assert one.keys() == other.keys()
    assert not [name for name in one if not torch.equal(one[name], other[name])]


def told_lineage(path: Path) -> Any:
    with safe_open(path, "pt") as file:
        return orjson.loads(file.metadata()[KEY])


def elsewhere(config: TrainConfig, name: str, **changes: Any) -> TrainConfig:
    return TrainConfig.model_validate(config.model_dump() | {"out": config.out / name} | changes)


def test_interrupted_at_20_random_steps_is_never_interrupted_bit_for_bit(config: Configure, train: Train) -> None:
    """AdamW8bit, stochastic rounding, an average of the weights, caption dropout, accumulation, trained encoder."""
    whole = config(
        **SMALL, max_train_steps=24, train_batch_size=1, gradient_accumulation_steps=2, caption_dropout_rate=0.3,
        ema_decay=0.9, ema_every_steps=3, learning_rate_te1=1e-4,
    )  # fmt: skip
    assert train(whole)
    stops = sorted(np.random.default_rng(5).choice(np.arange(1, 24), size=20, replace=False).tolist())
    broken = elsewhere(whole, "broken")
    for done, stop in zip((0, *stops), stops, strict=False):
        assert not train(broken, stop_at=stop - done)
    assert train(broken)
    assert_same(model(broken), model(whole))
    ours, theirs = (read_generation(run.out / "state" / "step-00000024") for run in (broken, whole))
    for file, tensors in theirs.tensors.items():
        assert_same(dict(ours.tensors[file]), dict(tensors))
    assert ours.scalars == theirs.scalars and ours.scalars["losses"]["count"] == 5, "avr_loss is of an epoch"
    assert {path.name for path in ours.path.iterdir()} == {
        "weights.safetensors", "optimizer.safetensors", "ema.safetensors", "manifest.json",
    }  # fmt: skip
    assert (ours.path / "manifest.json").stat().st_size < 1000, "state under 1 kB plus weights and optimizer"


@pytest.mark.parametrize("rounding", ["stochastic", "kahan"])
def test_updates_within_the_backward_pass_are_the_same_updates(config: Configure, train: Train, rounding: str) -> None:
    after = config(
        max_train_steps=3, max_grad_norm=0.0, learning_rate_te2=1e-4, gradient_checkpointing="blocks",
        weights_rounding=rounding,
    )  # fmt: skip
    within = elsewhere(after, "within", fused_backward=True)
    assert train(after) and train(within)
    assert_same(model(within), model(after))


def test_fused_updates_need_one_process_and_no_accumulation(config: Configure) -> None:
    for wrong in ({"num_processes": 2}, {"gradient_accumulation_steps": 2}):
        with pytest.raises(ValueError, match="fused_backward updates weights during the backward pass"):
            config(fused_backward=True, **wrong)


def run_with_bad_gradient(config: TrainConfig, *, at_backward: int | None, known_bad: list[int]) -> dict[str, Tensor]:
    """A run in which one weight's gradient is NaN in one backward pass. Returns the last saved weights."""
    AcceleratorState._reset_state(reset_partial_state=True)
    try:
        training_set = read_training_set(config)
        run = loop.Run(config, loop.make_accelerator(config), training_set, training_set.plan(config))
        run.guard.bad_steps = known_bad
        count = 0

        def spoil(gradient: Tensor) -> Tensor:
            nonlocal count
            count += 1
            return gradient * (math.nan if count - 1 == at_backward else 1.0)

        run.denoiser.unet.conv_out.weight.register_hook(spoil)

        class Never:
            received = False

        assert run.to_the_end(Never())  # type: ignore[arg-type]
        run.accelerator.end_training()
        generation = load_newest(run.state, settings=run.settings)
        assert generation is not None and generation.step == config.max_train_steps
        assert generation.scalars["guard"]["bad_steps"] == [3]
        return dict(generation.tensors["weights"])
    finally:
        AcceleratorState._reset_state(reset_partial_state=True)


def test_a_fused_run_goes_back_behind_a_bad_gradient_and_leaves_its_step_out(
    config: Configure, caplog: pytest.LogCaptureFixture
) -> None:
    """Step 3 is bad: back to the copy of step 2, step 2 again, step 3 left out; as if it had been known."""
    options = {**SMALL, "fused_backward": True, "max_bad_steps": 1, "snapshot_every_steps": 2, "ema_decay": 0.9}
    met = config(**options, max_train_steps=6)
    with caplog.at_level(logging.WARNING):
        weights = run_with_bad_gradient(met, at_backward=3, known_bad=[])
    assert "step 4: the loss or its gradient is not finite" in caplog.text and "seen on 'pic" in caplog.text
    assert "Weights go back to step 2." in caplog.text
    known = elsewhere(met, "known")
    assert_same(weights, run_with_bad_gradient(known, at_backward=None, known_bad=[3]))


def spoiled(make_latents: Callable[..., tuple[Path, Path]], folder: Path, **changes: Any) -> TrainConfig:
    """A run over four pictures of which one holds NaN."""
    metadata, latents = make_latents(folder, num_samples=4)
    with np.load(latents / "pic02.npz") as file:
        broken = dict(file)
    broken["latents"][0, 0, 0] = np.nan
    np.savez(latents / "pic02.npz", **broken)
    values = {"metadata": metadata, "latents": latents, "out": folder / "run", "use_cpu": True, "max_train_steps": 8}
    return TrainConfig.model_validate(values | SMALL | changes)


@pytest.mark.parametrize("fused", [False, True])
def test_bad_steps_are_left_out_and_named_and_too_many_end_the_run(
    train: Train, tmp_path: Path, make_latents: Callable[..., tuple[Path, Path]], fused: bool,
    caplog: pytest.LogCaptureFixture,
) -> None:  # fmt: skip
    run = spoiled(make_latents, tmp_path, max_bad_steps=2, fused_backward=fused)
    with caplog.at_level(logging.WARNING):
        assert train(run)
    assert caplog.text.count("'pic02' (loss nan)") == 2, "once an epoch"
    assert all(value.isfinite().all() for value in model(run).values())
    with pytest.raises(TrainingError, match=r"'pic02' \(loss nan\).*number 2 within 1000 steps"):
        train(elsewhere(run, "strict", max_bad_steps=1))


def test_a_spike_is_bad_once_there_is_an_average() -> None:
    guard = Guard(max_bad_steps=3, spike_factor=5.0, metadata_name="meta_lat.json")
    for _ in range(WARM_UP_STEPS):
        assert not guard.fault({"a": 0.1}, watched=2.0, what="gradient norm")
        guard.passed(2.0)
    assert not guard.fault({"a": 0.1}, watched=9.9, what="gradient norm")
    assert "a spike: gradient norm 10.1, 5.05 times" in guard.fault({"a": 0.1}, watched=10.1, what="gradient norm")
    again = Guard(max_bad_steps=3, spike_factor=5.0, metadata_name="meta_lat.json")
    again.load(guard.state())
    assert again.state() == guard.state()


def test_the_average_of_the_weights_is_what_it_says_and_can_be_exported(config: Configure, train: Train) -> None:
    run = config(
        **SMALL, max_train_steps=4, weights_dtype="float32", ema_decay=0.8, ema_every_steps=2, save_every_steps=1,
        keep_states=9,
    )  # fmt: skip
    assert train(run)
    states = {step: read_generation(run.out / "state" / f"step-{step:08d}") for step in range(1, 5)}
    name = "unet.conv_out.weight"
    base = loop.load_trained_models(run, device=torch.device("cpu")).denoiser.unet.conv_out.weight.detach()
    expected = base
    for step in (2, 4):
        expected = 0.8**2 * expected + (1 - 0.8**2) * states[step].tensors["weights"][name]
    torch.testing.assert_close(states[4].tensors["ema"][name], expected, rtol=1e-6, atol=1e-8)
    later = run.model_copy(update={"metadata": run.out / "gone.json"})
    file = loop.save_checkpoint(states[4], path=run.out / "ema.safetensors", weights="ema", config=later)
    assert told_lineage(file.path)["metadata"]["sha256"] == sha256_file(run.metadata), "as it was when it was read"
    exported = load_file(file.path)
    assert torch.equal(exported["model.diffusion_model.out.2.weight"], states[4].tensors["ema"][name])
    frozen = "conditioner.embedders.0.transformer.text_model.final_layer_norm.weight"
    assert torch.equal(exported[frozen], model(run)[frozen])


def test_freezing_by_name(config: Configure, train: Train) -> None:
    run = config(freeze=["unet.*attn*", "*bias"], max_train_steps=1)
    assert train(run)
    names = set(read_generation(run.out / "state" / "step-00000001").tensors["weights"])
    assert "unet.conv_in.weight" in names and not [n for n in names if "attn" in n or n.endswith("bias")]
    base = load_models("tiny", parts=("unet",), dtype=torch.float32).unet
    saved = model(run)["model.diffusion_model.input_blocks.0.0.bias"]
    assert torch.equal(saved, base.conv_in.bias), "not rounded to the bf16 of training"
    with pytest.raises(ConfigError, match=r"no weight is named like 'unet.nothing\*'"):
        train(elsewhere(run, "wrong", freeze=["unet.nothing*"]))
    with pytest.raises(ConfigError, match="leave nothing to train"):
        train(elsewhere(run, "all", freeze=["*"]))


def test_cached_text_outputs_train_as_the_encoders_do(config: Configure, train: Train) -> None:
    """Dropped captions and previews included; the second start encodes nothing, and changing captions are refused."""
    encoded = config(
        **SMALL, max_train_steps=4, caption_dropout_rate=0.3, weights_dtype="float32", mixed_precision="no",
        sample_prompts=["a boat"], sample_size_px=64, sample_inference_steps=1, optimizer="adamw", learning_rate=1e-4,
    )  # fmt: skip
    cached = elsewhere(encoded, "cached", cache_text_encoder_outputs=True)
    assert train(encoded) and train(cached)
    for name, value in model(encoded).items():
        torch.testing.assert_close(model(cached)[name], value, rtol=0, atol=2e-5, msg=name)
    losses = [read_result(run.model_copy(update={"use_cpu": True})) for run in (encoded, cached)]
    assert losses[0] and losses[1] and losses[0].final_avr_loss == pytest.approx(losses[1].final_avr_loss, rel=1e-5)
    (part,) = (cached.out / "text_outputs").glob("*/part-*.safetensors")
    assert len(load_file(part)["keys"]) == 11, "ten captions and the empty one"
    told = outputs_bytes(cached, read_training_set(cached), "tiny", free=10**9)
    assert told == pytest.approx(part.stat().st_size, rel=0.01), "the disk guard knows"
    written = part.stat().st_mtime_ns
    assert train(elsewhere(encoded, "cached", cache_text_encoder_outputs=True, max_train_steps=5))
    assert part.stat().st_mtime_ns == written and len(list(part.parent.iterdir())) == 1
    with pytest.raises(ValueError, match="shuffle_caption makes new captions each epoch"):
        config(cache_text_encoder_outputs=True, shuffle_caption=True)
    with pytest.raises(ValueError, match="a text encoder that trains has no outputs to keep"):
        config(cache_text_encoder_outputs=True, learning_rate_te1=1e-5)


def test_a_stop_is_heard_while_text_outputs_are_made(
    config: Configure, train: Train, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Between two files; the step that then notices it encodes what it needs, and the next start makes the rest."""

    class AfterTwoFiles(StopSignal):
        asked = 0

        def __init__(self) -> None: ...

        @property
        def received(self) -> bool:  # type: ignore[override]
            return self.asked > 2

        def is_set(self) -> bool:
            self.asked += 1
            return self.received

    monkeypatch.setattr(text_outputs, "PART_CAPTIONS", 4)
    run = config(**SMALL, max_train_steps=3, cache_text_encoder_outputs=True)
    assert not train(run, stop=AfterTwoFiles())
    assert len(list(run.out.glob("text_outputs/*/part-*"))) == 2 and (run.out / "state" / "step-00000001").is_dir()
    assert train(run)
    assert len(list(run.out.glob("text_outputs/*/part-*"))) == 3, "4 + 4 + 3 captions"


def test_equal_captions_are_kept_once_and_count_once_where_the_disk_is_small(config: Configure) -> None:
    cached = config(cache_text_encoder_outputs=True)
    same = Sample(key="a", sentence="", tags="boat", width_px=64, height_px=64)
    four: Any = SimpleNamespace(num_samples=4, samples=[same] * 3 + [replace(same, tags="sea")])
    one = outputs_bytes(cached, SimpleNamespace(num_samples=0), "tiny", free=10**9)  # type: ignore[arg-type]
    assert outputs_bytes(cached, four, "tiny", free=10**9) == 5 * one
    assert outputs_bytes(cached, four, "tiny", free=4 * one) == 3 * one
    assert outputs_bytes(config(), four, "tiny", free=0) == 0


def test_states_and_models_are_due_in_steps_and_epochs(config: Configure) -> None:
    times = SaveTimes(config(save_every_steps=4, save_every_epochs=2), steps_per_epoch=5)
    assert [step for step in range(1, 21) if times.state_is_due(step)] == [4, 8, 10, 12, 16, 20]
    named = SaveTimes(config(save_model_every_epochs=2, save_model_every_steps=4), steps_per_epoch=5)
    names = {step: named.model_name(step) for step in range(1, 21) if named.model_name(step)}
    assert names == {
        4: "last-step00000004.safetensors", 8: "last-step00000008.safetensors", 10: "last-000002.safetensors",
        12: "last-step00000012.safetensors", 16: "last-step00000016.safetensors", 20: "last-000004.safetensors",
    }  # fmt: skip
    assert named.state_is_due(10), "a model is made from a state"
    assert not SaveTimes(config(), steps_per_epoch=5).minutes_are_over()


def test_minutes_and_models_on_the_way(config: Configure, train: Train, monkeypatch: pytest.MonkeyPatch) -> None:
    run = config(
        **SMALL, max_train_steps=5, save_every_minutes=1.0, keep_states=5, save_model_every_steps=1, keep_models=2
    )
    assert train(run)
    assert sorted(path.name for path in (run.out / "model").iterdir()) == [
        "last-step00000003.safetensors", "last-step00000004.safetensors", "last.safetensors",
    ]  # fmt: skip
    for path in (run.out / "model").iterdir():
        assert told_lineage(path)["metadata"]["sha256"] == sha256_file(run.metadata), path.name
    clock = iter(range(0, 10**9, 40))  # every look at it is 40 seconds later
    monkeypatch.setattr(saving.time, "monotonic", lambda: float(next(clock)))
    times = SaveTimes(run, steps_per_epoch=100)
    assert [times.minutes_are_over(), times.minutes_are_over()] == [False, True]


def test_what_goes_wrong_while_saving_is_raised_by_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(path: Path) -> str:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("sdxl_core.training.state.sha256_file", full)
    saver = Saver(tmp_path, keep=2, rank=0, num_ranks=1)
    saver.submit(Snapshot(step=1, run={}, scalars={}, tensors={"weights": {"w": torch.zeros(2)}}))
    with pytest.raises(DiskFullError, match="the disk is full"):
        saver.wait()
    saver.wait()


def test_the_disk_guard_counts_every_model_file_and_the_average(
    config: Configure, train: Train, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What it says a run needs is what the run then has on the disk, but for the states that were not written yet."""
    usage = shutil.disk_usage("/")
    run = config(max_train_steps=6, save_model_every_steps=1, keep_models=0, ema_decay=0.9, ema_every_steps=1)
    with monkeypatch.context() as small:
        small.setattr(disk_guard.shutil, "disk_usage", lambda path: usage._replace(free=0))
        with pytest.raises(DiskFullError, match=r"3 resumable states.*averaged weights.*6 model files") as error:
            disk_guard.check_disk(run, read_training_set(run))
    needed = int(re.findall(r"needs ([\d,]+) bytes", str(error.value))[0].replace(",", ""))
    assert train(run)
    written = {name: [disk_guard._size(path) for path in (run.out / name).glob(pattern)]
               for name, pattern in (("model", "*"), ("state", "step-*"))}  # fmt: skip
    assert (len(written["model"]), len(written["state"])) == (6, 2)
    assert needed == pytest.approx(sum(written["model"]) + 3 * written["state"][0], rel=0.05)


def test_weights_that_are_frozen_by_name_need_no_room(config: Configure, monkeypatch: pytest.MonkeyPatch) -> None:
    usage, free = shutil.disk_usage("/"), 0
    monkeypatch.setattr(disk_guard.shutil, "disk_usage", lambda path: usage._replace(free=free))
    run = config(**SMALL)
    run.out.mkdir()
    with pytest.raises(DiskFullError) as error:
        disk_guard.check_disk(run, read_training_set(run))
    needed = int(re.findall(r"needs ([\d,]+) bytes", str(error.value))[0].replace(",", ""))
    state_bytes, model_bytes = disk_guard.most_disk_needs(run, "tiny")
    assert needed < 0.8 * (2 * state_bytes + model_bytes)
    free = needed
    disk_guard.check_disk(run, read_training_set(run))
    free = needed - 1
    with pytest.raises(DiskFullError, match="Free 1 bytes"):
        disk_guard.check_disk(run, read_training_set(run))


def test_only_what_is_there_at_once_counts() -> None:
    def most(**changes: Any) -> tuple[int, int]:
        values = {"metadata": Path("m"), "latents": Path("l"), "out": Path("o"), **changes}
        times = SaveTimes(TrainConfig.model_validate(values), steps_per_epoch=10)
        return times.most_states(100), times.most_models(100)

    assert most() == (2, 1), "one at the end, and one more if it is asked to stop"
    assert most(save_every_steps=50) == (3, 1)
    assert most(save_every_steps=10, keep_states=5) == (6, 1)
    assert most(save_every_minutes=5) == (3, 1)
    assert most(save_model_every_epochs=1) == (3, 10)
    assert most(save_model_every_epochs=1, keep_models=2) == (3, 4)
    assert most(save_model_every_epochs=1, save_model_every_steps=4) == (3, 1 + 9 + 24 - 4)
