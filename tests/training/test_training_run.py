"""Whole runs in this process: what they leave, that they repeat exactly, and that stopping changes nothing."""

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from accelerate.state import AcceleratorState
from safetensors import safe_open
from safetensors.torch import load_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import Tensor

from sdxl_core.config import TrainConfig
from sdxl_core.errors import CheckpointError, ConfigError, TrainingError
from sdxl_core.models import load_models, tokenize
from sdxl_core.report.pictures import preview_text
from sdxl_core.training import loop
from sdxl_core.training.heldout import read_heldout
from sdxl_core.training.objectives.noise import draw_noise
from sdxl_core.training.processes import StopSignal
from sdxl_core.training.result import read_result
from sdxl_core.training.training_set import read_training_set

Configure = Callable[..., TrainConfig]
Train = Callable[..., bool]
EVERYTHING: dict[str, Any] = {
    "max_train_steps": 5, "gradient_accumulation_steps": 2, "learning_rate_te1": 1e-4, "learning_rate_te2": 1e-4,
    "caption_dropout_rate": 0.3, "shuffle_caption": True, "keep_tokens": 1, "lr_scheduler": "constant_with_warmup",
    "lr_warmup_steps": 3, "noise_offset": 0.05, "min_snr_gamma": 5.0,
}  # fmt: skip
PLAIN: dict[str, Any] = {
    "optimizer": "adamw", "weights_dtype": "float32", "mixed_precision": "no", "gradient_checkpointing": False,
}  # fmt: skip
V_ZERO: dict[str, Any] = {"prediction_type": "v_prediction", "zero_terminal_snr": True}
FLOW: dict[str, Any] = {"prediction_type": "rectified_flow", "flow_shift": 3.0}
GOLDEN = Path(__file__).parents[1] / "golden" / "loss_50_steps.txt"


def checkpoint(config: TrainConfig) -> dict[str, Tensor]:
    return load_file(config.out / "model" / f"{config.output_name}.safetensors")


def assert_same_tensors(one: dict[str, Tensor], other: dict[str, Tensor]) -> None:
    assert one.keys() == other.keys()
    assert not [name for name in one if not torch.equal(one[name], other[name])]


def scalars(config: TrainConfig) -> dict[str, list[tuple[int, float]]]:
    (run,) = (config.out / "tensorboard").iterdir()
    events = EventAccumulator(str(run), size_guidance={"scalars": 0})
    events.Reload()
    return {name: [(e.step, e.value) for e in events.Scalars(name)] for name in events.Tags()["scalars"]}


@pytest.fixture(scope="module")
def undisturbed(cache: tuple[Path, Path], train: Train, tmp_path_factory: pytest.TempPathFactory) -> TrainConfig:
    """A finished run with everything on."""
    metadata, latents = cache
    values = {
        "metadata": metadata, "latents": latents, "out": tmp_path_factory.mktemp("undisturbed"), "use_cpu": True,
        "train_batch_size": 2, "learning_rate": 1e-3, "save_precision": "fp32", "log_prefix": "test_",
        "sample_prompts": ["a boat", "the sea"], "sample_every_steps": 3, "sample_size_px": 64,
        "sample_inference_steps": 2,
    }  # fmt: skip
    config = TrainConfig.model_validate(values | EVERYTHING)
    assert train(config)
    return config


@pytest.mark.parametrize("stops", [(1,), (2, 4)])
def test_a_stopped_run_continues_bit_for_bit(
    train: Train, undisturbed: TrainConfig, tmp_path: Path, stops: tuple[int, ...]
) -> None:
    """AdamW8bit, stochastic rounding, accumulation, dropout, shuffling, warm-up, trained encoders: all of it.

    And previews: the undisturbed run made some, these make none.
    """
    config = undisturbed.model_copy(update={"out": tmp_path, "sample_prompts": []})
    for done, stop in zip((0, *stops), stops, strict=False):
        assert not train(config, stop_at=stop - done)
        assert (config.out / "state" / f"step-{stop:08d}").is_dir()
    assert train(config)
    assert_same_tensors(checkpoint(config), checkpoint(undisturbed))
    ours, theirs = scalars(config), scalars(undisturbed)
    for name in ("loss", "avr_loss", "grad_norm", "lr/unet", "update_share"):
        assert ours[name] == theirs[name], "one point a step, the same value"


class StopWhile(StopSignal):
    """A SIGTERM that comes while the pictures, or the measurement, after `step` steps are made."""

    def __init__(self, step: int, *, asked: int) -> None:
        self.steps, self.looks, self._step, self._asked = 0, 0, step, asked

    @property
    def received(self) -> bool:  # type: ignore[override]
        self.steps += 1
        return self.is_set(look=False)

    def is_set(self, *, look: bool = True) -> bool:
        self.looks += look and self.steps == self._step
        return self.looks >= self._asked


def test_a_stop_is_heard_between_two_pictures_and_two_batches(train: Train, config: Configure) -> None:
    """It is looked at before each of 2 pictures and behind them, then before each batch; at the end batches are first.

    What was left out is made when the run goes on.
    """
    undisturbed = config(
        max_train_steps=4, sample_prompts=["a boat", "the sea"], sample_every_steps=2, sample_at_first=True,
        sample_size_px=64, sample_inference_steps=1, heldout_count=2, heldout_bins=2, heldout_every_steps=2,
        freeze=["unet.down_blocks.*", "unet.up_blocks.*"],
    )  # fmt: skip
    assert train(undisturbed)
    for step, asked, num_drawn in ((0, 2, 1), (2, 2, 1), (2, 5, 2), (4, 2, 0)):
        run = undisturbed.model_copy(update={"out": undisturbed.out / f"{step}-{asked}"})
        assert not train(run, stop=StopWhile(step, asked=asked))
        saved = [path.name for path in (run.out / "state").glob("step-*")]
        assert saved == ([] if step == 0 else [f"step-{step:08d}"])
        assert len(list((run.out / "samples").glob(f"*_{step:06d}_*"))) == num_drawn
        assert train(run)
        assert_same_tensors(checkpoint(run), checkpoint(undisturbed))
        pictures = [sorted(path.name for path in (each.out / "samples").iterdir()) for each in (run, undisturbed)]
        assert pictures[0] == pictures[1] and len(pictures[0]) == 6
        measured = [[(one.step, one.loss) for one in read_heldout(each.out)] for each in (run, undisturbed)]
        assert measured[0] == measured[1] and len(measured[0]) == 3
    run = undisturbed.model_copy(update={"out": undisturbed.out / "last step", "sample_prompts": []})
    assert not train(run, stop_at=4), "the measurement behind the last step is still to be made"
    assert train(run) and [one.step for one in read_heldout(run.out)] == [0, 2, 4]


def test_who_asks_to_stop_need_not_wait_for_pictures(train: Train, config: Configure) -> None:
    """The state is saved, and the previews of the same step, which here cannot be written at all, are not begun."""
    run = config(
        max_train_steps=6, sample_prompts=["a boat"], sample_every_steps=2, sample_size_px=64, sample_inference_steps=1
    )
    run.out.mkdir(parents=True)
    (run.out / "samples").touch()
    assert not train(run, stop_at=2)
    assert (run.out / "state" / "step-00000002").is_dir()
    (run.out / "samples").unlink()
    assert not train(run, stop_at=1)
    assert len(list((run.out / "samples").glob("*_000002_*"))) == 1, "drawn when the run goes on"


def test_a_torn_newest_state_costs_only_time(train: Train, undisturbed: TrainConfig, tmp_path: Path) -> None:
    config = undisturbed.model_copy(update={"out": tmp_path, "save_every_steps": 1})
    assert not train(config, stop_at=3)
    newest = config.out / "state" / "step-00000003" / "optimizer.safetensors"
    newest.write_bytes(newest.read_bytes()[:1000])
    assert train(config)
    assert_same_tensors(checkpoint(config), checkpoint(undisturbed))
    assert scalars(config)["loss"] == scalars(undisturbed)["loss"]


def test_more_steps_continue_a_finished_run(train: Train, undisturbed: TrainConfig, config: Configure) -> None:
    short = config(**PLAIN, max_train_steps=2)
    assert train(short)
    assert train(short.model_copy(update={"max_train_steps": 4}))
    whole = short.model_copy(update={"max_train_steps": 4, "out": short.out / "whole"})
    assert train(whole)
    assert_same_tensors(checkpoint(short), checkpoint(whole))
    with pytest.raises(ConfigError, match="is at step 4 already; max_train_steps = 3"):
        train(short.model_copy(update={"max_train_steps": 3}))
    with pytest.raises(ConfigError, match=r"learning_rate \(0.001 there, 0.002 now\)"):
        train(short.model_copy(update={"learning_rate": 2e-3}))


def test_tensorboard_shows_losses_and_rates_by_part(undisturbed: TrainConfig) -> None:
    (run,) = (undisturbed.out / "tensorboard").iterdir()
    assert run.name.startswith("test_")
    points = scalars(undisturbed)
    assert set(points) == {
        "loss", "avr_loss", "grad_norm", "images_per_s", "update_share", "lr/unet", "lr/text_encoder1",
        "lr/text_encoder2", "memory_gb", "seconds/data", "seconds/forward", "seconds/backward", "seconds/sync",
        "seconds/optimizer", "seconds/save",
    }  # fmt: skip
    assert all(value > 0 for name in ("memory_gb", "seconds/forward", "seconds/optimizer") for _, value in points[name])
    assert [step for step, _ in points["loss"]] == [1, 2, 3, 4, 5]
    assert [value for _, value in points["lr/unet"]] == pytest.approx([0, 1e-3 / 3, 2e-3 / 3, 1e-3, 1e-3])
    assert points["lr/text_encoder2"][-1][1] == pytest.approx(1e-4)
    losses = [value for _, value in points["loss"]]
    assert [v for _, v in points["avr_loss"]][-1] == pytest.approx(np.mean(losses[-3:])), "an epoch has three steps"
    assert all(0.8 < share < 1.2 for _, share in points["update_share"][1:])


def test_a_run_leaves_checkpoint_previews_and_result(undisturbed: TrainConfig) -> None:
    result = read_result(undisturbed)
    assert result is not None
    assert (result.num_steps, result.num_images) == (5, 10)
    assert sorted(path.name for path in result.samples) == [
        f"last_{step:06d}_{i:02d}_0.png" for step in (3, 5) for i in (0, 1)
    ]
    assert all(path.stat().st_size > 500 for path in result.samples)
    told = [preview_text(path) for path in result.samples]
    assert told == [(f"step {step}", prompt) for step in (3, 5) for prompt in undisturbed.sample_prompts]
    with safe_open(result.file.path, framework="pt") as file:
        metadata = file.metadata()
    assert metadata["modelspec.architecture"] == "stable-diffusion-xl-v1-base"
    assert metadata["sdxl_flows.steps"] == "5"
    assert metadata["sdxl_flows.dataset_digest"] == read_training_set(undisturbed).digest
    assert TrainConfig.model_validate_json(metadata["sdxl_flows.config"]) == undisturbed


@pytest.mark.parametrize(
    ("rates", "moving", "scalar"),
    [
        ({"learning_rate": 1e-3}, "model.diffusion_model.", "lr/unet"),
        ({"learning_rate": 0, "learning_rate_te1": 1e-3}, "conditioner.embedders.0.", "lr/text_encoder1"),
        ({"learning_rate": 0, "learning_rate_te2": 1e-3}, "conditioner.embedders.1.", "lr/text_encoder2"),
    ],
)
def test_only_what_has_a_rate_changes(
    train: Train, config: Configure, tmp_path: Path, rates: dict[str, float], moving: str, scalar: str
) -> None:
    from sdxl_core.models import save_single_file

    trained = config(**rates, max_train_steps=1, mixed_precision="bf16")
    assert train(trained)
    base = load_models("tiny", dtype=torch.float32)
    save_single_file(tmp_path / "base.safetensors", base, precision="fp32", metadata={})
    before, after = load_file(tmp_path / "base.safetensors"), checkpoint(trained)
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed and all(name.startswith(moving) for name in changed)
    assert {name for name in scalars(trained) if name.startswith("lr/")} == {scalar}


def test_one_step_equals_a_plain_diffusers_script(train: Train, config: Configure) -> None:
    """Loss and updated weights of the first step, against a loop as diffusers' own SDXL example has it."""
    from diffusers import DDPMScheduler
    from support.epochs import plan_epochs

    from sdxl_core.training.order import batches_of_epoch

    ours = config(**PLAIN, max_train_steps=1, seed=11)
    assert train(ours)
    training_set = read_training_set(ours)
    plan = plan_epochs(
        [(s.width_px, s.height_px) for s in training_set.samples], global_batch_size=2, accumulation_steps=1, seed=11
    )
    samples = [training_set.samples[i] for i in batches_of_epoch(plan, 0)[0]]
    files = [np.load(ours.latents / f"{sample.key}.npz") for sample in samples]
    captions = [", ".join(part for part in (sample.sentence, sample.tags) if part) for sample in samples]

    models = load_models("tiny", dtype=torch.float32)
    scheduler = DDPMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear")
    latents = torch.stack([torch.from_numpy(file["latents"]) for file in files]) * 0.13025
    draw = draw_noise([s.key for s in samples], latents, epoch=0, seed=11)
    tokens = tokenize(captions, max_token_length=75)
    with torch.no_grad():
        one = models.text_encoder(tokens.clip_l[:, 0], output_hidden_states=True)
        two = models.text_encoder_2(tokens.clip_g[:, 0], output_hidden_states=True)
    prompt_embeds = torch.cat([one.hidden_states[-2], two.hidden_states[-2]], dim=-1)
    ids = [
        [int(f["original_size"][1]), int(f["original_size"][0]), int(f["crop_ltrb"][1]), int(f["crop_ltrb"][0]),
         s.height_px, s.width_px] for f, s in zip(files, samples, strict=True)
    ]  # fmt: skip
    optimizer = torch.optim.AdamW(models.unet.parameters(), lr=1e-3, weight_decay=0.01)
    prediction = models.unet(
        scheduler.add_noise(latents, draw.noise, draw.timesteps),
        draw.timesteps,
        prompt_embeds,
        added_cond_kwargs={"text_embeds": two.text_embeds, "time_ids": torch.tensor(ids, dtype=torch.float32)},
    ).sample
    loss = torch.nn.functional.mse_loss(prediction.float(), draw.noise.float())
    loss.backward()
    torch.nn.utils.clip_grad_norm_(models.unet.parameters(), 1.0)
    optimizer.step()

    assert scalars(ours)["loss"][0][1] == pytest.approx(loss.item(), rel=1e-5)
    trained = load_models(str(ours.out / "model" / "last.safetensors"), parts=("unet",), dtype=torch.float32).unet
    start, expected, actual = (
        torch.nn.utils.parameters_to_vector(unet.parameters()).detach()
        for unet in (load_models("tiny", parts=("unet",), dtype=torch.float32).unet, models.unet, trained)
    )
    error = torch.linalg.vector_norm(actual - expected) / torch.linalg.vector_norm(expected - start)
    assert error < 1e-3, "a first AdamW step is a sign, so single elements with almost no gradient may differ"


def test_loss_of_50_steps_is_golden(train: Train, config: Configure, request: pytest.FixtureRequest) -> None:
    """To record it anew after a wanted change: delete tests/golden/loss_50_steps.txt and run this test once."""
    run = config(**PLAIN, max_train_steps=50, learning_rate_te1=1e-4, learning_rate_te2=1e-4, caption_dropout_rate=0.2)
    assert train(run)
    losses = [value for _, value in scalars(run)["loss"]]
    if not GOLDEN.exists():
        GOLDEN.write_text("".join(f"{loss:.7f}\n" for loss in losses))
        pytest.fail(f"{GOLDEN} was missing and has been written; look at it and commit it")
    assert losses == pytest.approx([float(line) for line in GOLDEN.read_text().split()], rel=1e-4)


@pytest.mark.parametrize(
    ("options", "markers"),
    [
        (V_ZERO | {"min_snr_gamma": 5.0, "optimizer": "lion8bit"}, {"v_pred", "ztsnr"}),
        (FLOW | {"loss_type": "huber", "weights_rounding": "kahan"}, set()),
        ({"weighted_captions": True, "caption_prefix": "(big:1.5)", "multires_noise_iterations": 4}, set()),
    ],
)  # fmt: skip
def test_other_objectives_and_optimizers_train_save_and_draw(
    train: Train, config: Configure, options: dict[str, Any], markers: set[str]
) -> None:
    run = config(
        **options, max_train_steps=2, learning_rate_te2=1e-4, sample_prompts=["a boat"], sample_size_px=64,
        sample_inference_steps=2,
    )  # fmt: skip
    assert train(run)
    assert {key for key in checkpoint(run) if "." not in key} == markers
    assert all(np.isfinite(value) for _, value in scalars(run)["loss"])
    assert len(list((run.out / "samples").glob("*.png"))) == 1


def test_checkpointing_activations_changes_no_number(train: Train, config: Configure) -> None:
    runs = [
        config(**PLAIN | {"gradient_checkpointing": on}, learning_rate_te1=1e-4, max_train_steps=2) for on in (0, 1)
    ]
    for i, run in enumerate(runs):
        runs[i] = run.model_copy(update={"out": run.out / str(i)})
        assert train(runs[i])
    assert_same_tensors(checkpoint(runs[0]), checkpoint(runs[1]))


def test_models_that_are_made_beside_training_have_their_own_weights(train: Train, config: Configure) -> None:
    """A thread writes a model while steps compute activations again: neither moves the other's random numbers."""
    done = threading.Event()

    def vaes() -> list[dict[str, Tensor]]:
        made = []
        while not done.is_set():
            made.append(load_models("tiny", parts=("vae",), dtype=torch.float32).vae.state_dict())
        return made

    with ThreadPoolExecutor(1) as pool:
        beside = pool.submit(vaes)
        try:
            assert train(config(**PLAIN | {"gradient_checkpointing": "all"}, learning_rate_te2=1e-4, max_train_steps=3))
        finally:
            done.set()
        first, *others = beside.result()
    assert others
    for made in others:
        assert_same_tensors(made, first)


def test_a_loss_that_is_not_finite_stops_before_it_is_applied_and_names_the_picture(
    train: Train, tmp_path: Path, make_latents: Callable[..., tuple[Path, Path]]
) -> None:
    metadata, latents = make_latents(tmp_path, num_samples=4)
    with np.load(latents / "pic02.npz") as file:
        broken = dict(file)
    broken["latents"][0, 0, 0] = np.nan
    np.savez(latents / "pic02.npz", **broken)
    config = TrainConfig(
        metadata=metadata, latents=latents, out=tmp_path / "run", use_cpu=True, max_train_steps=4,
        save_every_steps=1, mixed_precision="no",
    )  # fmt: skip
    with pytest.raises(TrainingError, match=r"not finite.*'pic02' \(loss nan\)"):
        train(config)
    assert not (config.out / "model").exists()


def test_all_states_damaged_is_said(train: Train, config: Configure) -> None:
    run = config(**PLAIN, max_train_steps=1)
    assert train(run)
    (run.out / "state" / "step-00000001" / "weights.safetensors").write_bytes(b"")
    with pytest.raises(CheckpointError, match="Delete the folder"):
        train(run)


def test_another_number_of_processes_is_refused(train: Train, config: Configure) -> None:
    with pytest.raises(ConfigError, match="num_processes = 2, but 1 training processes were started"):
        train(config(num_processes=2))


def test_processes_wait_for_one_that_works_alone_for_hours(config: Configure) -> None:
    """torch's own limit is ten minutes, and encoding a million captions takes longer."""
    AcceleratorState._reset_state(reset_partial_state=True)
    try:
        handler = loop.make_accelerator(config()).init_handler
    finally:
        AcceleratorState._reset_state(reset_partial_state=True)
    assert handler is not None and handler.timeout >= timedelta(days=1)
