"""The loss of pictures that are never trained on, with the same noise each time, by ranges of timesteps.

The training loss is mostly the luck of its timesteps; this one moves only when the model does.
"""

from __future__ import annotations

import csv
import io
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import numpy as np
import orjson
import torch
from torch import Tensor

from sdxl_core.config import TrainConfig
from sdxl_core.files import write_atomic
from sdxl_core.training.batches import BatchMaker, MicroBatch
from sdxl_core.training.order import Indices
from sdxl_core.training.training_set import TrainingSet

HELDOUT_CSV, HELDOUT_JSON = "heldout.csv", "heldout.json"
Losses = Callable[[MicroBatch], Tensor]


@dataclass(frozen=True, slots=True, kw_only=True)
class HeldOutLoss:
    """After `step` optimizer steps: the mean loss, and that of each range of timesteps."""

    step: int
    loss: float
    by_bin: tuple[float, ...]


def timestep_bins(config: TrainConfig) -> list[tuple[int, int]]:
    """[low, high) of each range: `heldout_bins` equal parts of the timesteps that are trained on."""
    edges = np.linspace(config.min_timestep, config.max_timestep, config.heldout_bins + 1).round().astype(int).tolist()
    return [(low, max(high, low + 1)) for low, high in pairwise(edges)]


class HeldOut:
    """Measures, and keeps what was measured in `OUT/heldout.csv` and `OUT/heldout.json`."""

    def __init__(self, config: TrainConfig, training_set: TrainingSet, batches: BatchMaker, *, total: int) -> None:
        self._config, self._batches, self._total = config, batches, total
        self._bins = timestep_bins(config)
        size = config.train_batch_size
        groups = [bucket[i : i + size] for bucket in training_set.heldout for i in range(0, len(bucket), size)]
        self._units = [(group, number) for group in groups for number in range(len(self._bins))]
        self._num_samples = training_set.num_heldout

    def is_due(self, step: int) -> bool:
        """Before the first step, every `heldout_every_steps` and at the end."""
        return bool(self._units) and (step % self._config.heldout_every_steps == 0 or step == self._total)

    def is_measured(self, step: int) -> bool:
        """Is the measurement after `step` steps among those that are kept?"""
        return any(one.step == step for one in read_heldout(self._config.out))

    @torch.no_grad()
    def measure(
        self,
        losses: Losses,
        *,
        step: int,
        rank: int,
        num_processes: int,
        gather: Callable[[Tensor], Tensor],
        leave: Callable[[], bool] = lambda: False,
    ) -> HeldOutLoss | None:
        """Every process computes its share; all of them must call this, and all get the same.

        Args:   losses: the loss of each sample of a micro-batch, [B].   gather: from all processes, stacked in dim 0.
                leave: asked before each batch, on all processes alike; true: nothing is measured (None).
        """
        rounds = -(-len(self._units) // num_processes)
        rows = []
        for turn in range(rounds):
            if leave():
                return None
            at = turn * num_processes + rank
            found = self._of(self._units[min(at, len(self._units) - 1)], losses)  # for company, where there is no more
            rows.append(found if at < len(self._units) else torch.full_like(found, torch.nan))
        gathered = gather(torch.stack(rows)).view(num_processes, rounds, -1).transpose(0, 1).flatten(0, 1)
        values = gathered[: len(self._units)].double().cpu()
        bins = torch.tensor([number for _, number in self._units])
        by_bin = tuple(float(values[bins == number].nanmean()) for number in range(len(self._bins)))
        return HeldOutLoss(step=step, loss=float(values.nanmean()), by_bin=by_bin)

    def scalars(self, found: HeldOutLoss) -> dict[str, float]:
        """For TensorBoard."""
        names = [f"heldout/t{low:04d}-{high - 1:04d}" for low, high in self._bins]
        return {"heldout/loss": found.loss, **dict(zip(names, found.by_bin, strict=True))}

    def keep(self, found: HeldOutLoss) -> None:
        """Add a measurement to the run's files; those of later steps (of a run that went back) are dropped."""
        earlier = [one for one in read_heldout(self._config.out) if one.step < found.step]
        if earlier and len(earlier[0].by_bin) != len(self._bins):
            earlier = []
        measured = [*earlier, found]
        record = {
            "num_samples": self._num_samples,
            "bins": self._bins,
            "measurements": [{"step": m.step, "loss": m.loss, "by_bin": m.by_bin} for m in measured],
        }
        text = io.StringIO()
        writer = csv.writer(text, lineterminator="\n")
        writer.writerow(["step", "loss", *(f"t{low:04d}-{high - 1:04d}" for low, high in self._bins)])
        writer.writerows([m.step, m.loss, *m.by_bin] for m in measured)
        write_atomic(self._config.out / HELDOUT_CSV, text.getvalue().encode(), sync=False)
        write_atomic(self._config.out / HELDOUT_JSON, orjson.dumps(record, option=orjson.OPT_INDENT_2), sync=False)

    def _of(self, unit: tuple[Indices, int], losses: Losses) -> Tensor:
        """Losses of a unit, padded with NaN to the batch size, float32 [train_batch_size]."""
        numbers, number = unit
        found = losses(self._batches.fixed(numbers, self._bins[number])).float()
        padded = torch.full((self._config.train_batch_size,), torch.nan, device=found.device)
        padded[: len(found)] = found
        return padded


def read_heldout(out: Path) -> list[HeldOutLoss]:
    """What was measured so far, by step; [] where nothing was."""
    try:
        record = orjson.loads((out / HELDOUT_JSON).read_bytes())
        return [
            HeldOutLoss(step=one["step"], loss=one["loss"], by_bin=tuple(one["by_bin"]))
            for one in record["measurements"]
        ]
    except (FileNotFoundError, orjson.JSONDecodeError, KeyError, TypeError):
        return []
