"""More processes than rows: one of two divided processes holds nothing of what trains (gloo)."""

from __future__ import annotations

import socket
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import torch.distributed as dist
from torch import multiprocessing, nn

from sdxl_core.config import TrainConfig
from sdxl_core.training.guard import Guard
from sdxl_core.training.loss_average import LossAverage
from sdxl_core.training.optimizer import SlotOptimizer, parameter_group
from sdxl_core.training.parallel import gradient_norm
from sdxl_core.training.run_state import RunState
from sdxl_core.training.state import load_newest, save_snapshot
from sdxl_core.training.updates import Updater


def _run(config: TrainConfig, rank: int) -> tuple[nn.Linear, Updater, RunState]:
    from torch.distributed.fsdp import fully_shard

    torch.manual_seed(0)
    module = nn.Linear(8, 1, bias=False)
    fully_shard(module)
    groups = (parameter_group("unet", module, 0.1),)
    optimizer = SlotOptimizer(groups, kind="adamw", betas=(0.9, 0.99), eps=1e-8, weight_decay=0.0, seed=0)
    updater = Updater(optimizer, groups, max_grad_norm=1.0, lr_factor=lambda step: 1.0)
    training_set: Any = SimpleNamespace(digest="d", metadata_sha256="m", resolution_px=(64, 64))
    guard = Guard(max_bad_steps=0, spike_factor=None, metadata_name="meta_lat.json")
    average = LossAverage(config.out / "losses.f64" if rank == 0 else None, 3)
    state = RunState(
        updater, config=config, settings={}, training_set=training_set, average=average, guard=guard,
        writes=True,
    )  # fmt: skip
    return module, updater, state


def _process(rank: int, port: int, folder: str) -> None:
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=2)
    path = Path(folder)
    config = TrainConfig(
        metadata=path, latents=path, out=path, base_model="tiny", ema_decay=0.5, ema_every_steps=1,
        weights_dtype="float32",
    )  # fmt: skip
    module, updater, state = _run(config, rank)
    assert updater.pieces["unet.weight"].count == (8 if rank == 0 else 0)
    assert state.ema is not None
    for step in range(2):
        module(torch.ones(3, 8) + rank).sum().backward()
        state.ema.before_update()
        updater.apply(step, gradient_norm(module.parameters()))
        state.ema.after_step(step + 1)
    save_snapshot(path, state.snapshot(2), rank=rank, num_ranks=2)
    dist.barrier()
    _, _, again = _run(config, rank)
    generation = load_newest(path, settings={})
    assert generation is not None and again.restore(generation) == 2
    assert again.ema is not None
    for name, value in state.ema.tensors().items():
        assert torch.equal(again.ema.tensors()[name], value)
    assert list(state.ema.tensors()) == (["unet.weight"] if rank == 0 else [])
    for name, value in state.weights.items():
        assert torch.equal(again.weights[name], value)
    dist.destroy_process_group()


def test_a_process_that_holds_nothing_keeps_no_average_and_goes_on(tmp_path: Path) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    multiprocessing.spawn(_process, args=(port, str(tmp_path)), nprocs=2)  # type: ignore[no-untyped-call]
