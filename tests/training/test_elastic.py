"""The same run on other numbers of processes, alone, under DDP and divided by FSDP2 (two processes, gloo)."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import Tensor, nn

from sdxl_core.config import TrainConfig
from sdxl_core.errors import CheckpointError, ConfigError
from sdxl_core.training import launch
from sdxl_core.training.launch import launch_training
from sdxl_core.training.parallel import Piece, piece_of_shape, replicate
from sdxl_core.training.reshard import Requantised, code_book, dequantise, optimizer_states, quantise
from sdxl_core.training.state import Generation, Snapshot, read_generation

Configure = Callable[..., TrainConfig]
Train = Callable[..., bool]
EXACT: dict[str, Any] = {
    "optimizer": "adamw", "weights_dtype": "float32", "mixed_precision": "no", "gradient_checkpointing": "none",
    "learning_rate": 1e-4, "learning_rate_te2": 1e-4,
}  # fmt: skip
TOLERANCE = 2e-5


@pytest.fixture(autouse=True)
def one_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "1")


def model(config: TrainConfig, name: str = "last") -> dict[str, Tensor]:
    return load_file(config.out / "model" / f"{name}.safetensors")


def assert_close(one: dict[str, Tensor], other: dict[str, Tensor]) -> None:
    assert one.keys() == other.keys()
    for name, value in one.items():
        torch.testing.assert_close(other[name], value, rtol=0, atol=TOLERANCE, msg=name)


def first_scalar(config: TrainConfig, name: str) -> float:
    (run,) = (config.out / "tensorboard").iterdir()
    events = EventAccumulator(str(run))
    events.Reload()
    return float(events.Scalars(name)[0].value)


def on_two(config: TrainConfig, **changes: Any) -> TrainConfig:
    return config.model_copy(update={"num_processes": 2, "train_batch_size": 1, **changes})


def test_a_run_goes_from_one_process_to_two_divided_ones_and_back(config: Configure, train: Train) -> None:
    """fp32 AdamW with accumulation, checkpointing and an average of the weights: equal to one process within 2e-5."""
    whole = config(**EXACT, max_train_steps=6, gradient_accumulation_steps=2, ema_decay=0.9, ema_every_steps=1)
    assert train(whole)
    moved = whole.model_copy(update={"out": whole.out / "moved", "max_train_steps": 2})
    assert train(moved)
    divided = on_two(moved, parallel="fsdp", max_train_steps=4, gradient_checkpointing="all")
    launch_training(divided)
    saved = read_generation(moved.out / "state" / "step-00000004")
    assert len(saved.parts) == 2
    held = [part.tensors["weights"]["unet.conv_in.weight"].numel() for part in saved.parts]
    assert held[0] == held[1] == load_unet_size(model(whole)) // 2, "each process wrote its half"
    assert train(moved.model_copy(update={"max_train_steps": 6}))
    assert_close(model(moved), model(whole))
    averages = [read_generation(run.out / "state" / "step-00000006").tensors["ema"] for run in (whole, moved)]
    assert_close(*averages)


def load_unet_size(tensors: dict[str, Tensor]) -> int:
    return tensors["model.diffusion_model.input_blocks.0.0.weight"].numel()


def test_divided_8bit_states_are_those_of_the_whole(config: Configure, train: Train) -> None:
    """AdamW8bit, stochastic rounding, checkpointing, accumulation: which tensors are 8-bit, and the noise, stay."""
    one = config(max_train_steps=2, learning_rate=1e-4, gradient_checkpointing="all", gradient_accumulation_steps=2)
    assert train(one)
    two = on_two(one, out=one.out / "two", parallel="fsdp")
    launch_training(two)
    whole, halves = (read_generation(run.out / "state" / "step-00000002") for run in (one, two))
    dtypes = {name: value.dtype for name, value in whole.tensors["optimizer"].items()}
    for part in halves.parts:
        assert {name: value.dtype for name, value in part.tensors["optimizer"].items()}.items() <= dtypes.items()
    ours, theirs = model(two), model(one)
    moved = [name for name in ours if "diffusion_model" in name]
    difference = torch.cat([(ours[name].float() - theirs[name].float()).flatten() for name in moved])
    scale = torch.cat([theirs[name].float().flatten() for name in moved])
    assert difference.norm() / scale.norm() < 2e-3, "one bf16 step apart at most, here and there"

    for name, tolerance in (("update_share", 1e-3), ("grad_norm", 1e-2)):  # summed over both halves
        assert first_scalar(two, name) == pytest.approx(first_scalar(one, name), rel=tolerance), name

    again = two.model_copy(update={"max_train_steps": 3, "num_processes": 1, "train_batch_size": 2, "parallel": "ddp"})
    assert train(again), "and a single process takes the halves over"


def test_gradients_under_ddp_are_views_of_its_buckets(tmp_path: Path) -> None:
    """A gradient and its bucket are the same memory, so exchanging needs no second copy of all gradients."""
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/meeting", rank=0, world_size=1)
    try:
        model = replicate(nn.Linear(8, 4), device=torch.device("cpu"))
        for _ in range(2):
            model.zero_grad(set_to_none=True)
            model(torch.ones(1, 8)).sum().backward()
        gradients = [parameter.grad for parameter in model.parameters()]
        storages = {gradient.untyped_storage().data_ptr() for gradient in gradients if gradient is not None}
        assert len(gradients) == 2 and len(storages) == 1
    finally:
        dist.destroy_process_group()


def test_requantised_states_are_close(tmp_path: Path) -> None:
    """From two pieces to one and to three: block borders move; the error is a 256th part's rounding."""
    generator = torch.Generator().manual_seed(0)
    shape = (9, 500)
    whole = Piece(offset=0, count=4500, total=4500)
    values = {"state1": torch.randn(4500, generator=generator), "state2": torch.rand(4500, generator=generator) ** 4}
    codes = {key: code_book(signed=key == "state1") for key in values}

    def part(piece: Piece) -> Snapshot:
        tensors = {}
        for key, value in values.items():
            quantised, absmax = quantise(value[piece.offset : piece.offset + piece.count], codes[key])
            tensors |= {f"unet.w/{key}": quantised, f"unet.w/{key.replace('state', 'absmax')}": absmax}
        return Snapshot(
            step=1, run={}, scalars={}, numbers={"unet.w": {"step": 1}},
            tensors={"optimizer": tensors}, pieces={"unet.w": piece},
        )  # fmt: skip

    halves = tuple(part(piece_of_shape(shape, rank=rank, num_ranks=2)) for rank in range(2))
    generation = Generation(path=tmp_path, step=1, run={}, parts=halves)
    for num_ranks in (1, 3):
        for rank in range(num_ranks):
            piece = piece_of_shape(shape, rank=rank, num_ranks=num_ranks)
            tensors, numbers, measured = optimizer_states(generation, {"unet.w": piece}, {"unet.w": (piece.count,)})
            assert numbers == {"unet.w": {"step": 1}}
            is_cut_of_a_half = piece.offset == 0 and piece.count <= 2500
            assert (measured.relative_error == 0) if is_cut_of_a_half else (0 < measured.relative_error < 0.02)
            for key, value in values.items():
                absmax = tensors[f"unet.w/{key.replace('state', 'absmax')}"]
                got = dequantise(tensors[f"unet.w/{key}"], absmax, codes[key])
                wanted = value[piece.offset : piece.offset + piece.count]
                assert (got - wanted).norm() / wanted.norm() < 0.03
    same, _, measured = optimizer_states(generation, {"unet.w": halves[1].pieces["unet.w"]}, {"unet.w": (2000,)})
    assert measured == Requantised() and torch.equal(
        same["unet.w/state1"], halves[1].tensors["optimizer"]["unet.w/state1"]
    )
    assert whole.count == sum(half.pieces["unet.w"].count for half in halves)


def test_our_quantising_has_bitsandbytes_numbers_and_is_never_further_off() -> None:
    from bitsandbytes.functional import dequantize_blockwise, quantize_blockwise

    values = torch.randn(3000, generator=torch.Generator().manual_seed(1))
    codes = code_book(signed=True)
    theirs, state = quantize_blockwise(values, code=codes, blocksize=256)
    ours, absmax = quantise(values, codes)
    assert torch.equal(absmax, state.absmax)
    assert torch.equal(dequantise(theirs, absmax, codes), dequantize_blockwise(theirs, state))
    error, their_error = ((dequantise(each, absmax, codes) - values).abs() for each in (ours, theirs))
    assert (error <= their_error + 1e-6).all()


def test_states_of_an_optimizer_that_cannot_be_divided_are_refused(tmp_path: Path) -> None:
    part = Snapshot(
        step=1, run={}, scalars={}, numbers={"unet.w": {"step": 1}},
        tensors={"optimizer": {"unet.w/exp_avg_sq_row": torch.zeros(4)}},
    )  # fmt: skip
    generation = Generation(path=tmp_path, step=1, run={}, parts=(part,))
    with pytest.raises(CheckpointError, match=r"exp_avg_sq_row.*as many processes as before"):
        optimizer_states(generation, {"unet.w": Piece(offset=0, count=8, total=16)}, {"unet.w": (2, 4)})


def test_a_process_count_that_cannot_make_the_global_batch_is_refused(config: Configure, train: Train) -> None:
    run = config(**EXACT, max_train_steps=1)
    assert train(run)
    with pytest.raises(ConfigError, match="must see 2 pictures a micro-batch"):
        train(run.model_copy(update={"train_batch_size": 3, "max_train_steps": 2}))


def test_a_divided_run_needs_an_elementwise_optimizer(config: Configure) -> None:
    with pytest.raises(ValueError, match="adafactor needs whole ones"):
        config(num_processes=2, parallel="fsdp", optimizer="adafactor")
    assert launch.accelerate_config(config(num_processes=2, parallel="fsdp"))["distributed_type"] == "MULTI_GPU"
