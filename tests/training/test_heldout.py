"""The held-out loss: measured with the same noise each time, on pictures that are never trained on."""

import csv
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from sdxl_core.config import TrainConfig
from sdxl_core.report.page import _heldout
from sdxl_core.training.batches import BatchMaker, MicroBatch
from sdxl_core.training.heldout import HeldOut, read_heldout, timestep_bins
from sdxl_core.training.training_set import read_training_set

Configure = Callable[..., TrainConfig]
Train = Callable[..., bool]


def held(config: TrainConfig, *, total: int = 10) -> HeldOut:
    training_set = read_training_set(config)
    batches = BatchMaker(training_set, training_set.plan(config), config, rank=0)
    return HeldOut(config, training_set, batches, total=total)


def test_bins_cover_the_timesteps_that_are_trained_on(config: Configure) -> None:
    assert timestep_bins(config(heldout_bins=4)) == [(0, 250), (250, 500), (500, 750), (750, 1000)]
    assert timestep_bins(config(heldout_bins=3, min_timestep=100, max_timestep=200)) == [
        (100, 133), (133, 167), (167, 200),
    ]  # fmt: skip


@pytest.mark.parametrize("prediction_type", ["epsilon", "rectified_flow"])
def test_every_sample_is_measured_once_in_every_bin_with_noise_of_its_own(
    config: Configure, prediction_type: str
) -> None:
    run = config(heldout_count=4, heldout_bins=5, shuffle_caption=True, prediction_type=prediction_type)
    seen: dict[tuple[str, int], tuple[float, float]] = {}

    def losses(batch: MicroBatch) -> Tensor:
        for i, key in enumerate(batch.keys):
            timestep = float(batch.draw.timesteps[i])
            unit = (key, int(timestep // 200))
            assert unit not in seen
            seen[unit] = (timestep, float(batch.draw.noise[i].sum()))
        return torch.full((len(batch.keys),), float(batch.draw.timesteps[0] // 200))

    one = held(run).measure(losses, step=3, rank=0, num_processes=1, gather=lambda rows: rows)
    assert one is not None
    assert len(seen) == 4 * 5 and len(set(seen.values())) == 20
    assert one.by_bin == (0, 1, 2, 3, 4) and one.loss == 2
    before = dict(seen)
    seen.clear()
    held(run).measure(losses, step=7, rank=0, num_processes=1, gather=lambda rows: rows)
    assert seen == before, "the same noise at every step"


def test_any_number_of_processes_measures_the_same(config: Configure) -> None:
    run = config(heldout_count=5, heldout_bins=3)

    def losses(batch: MicroBatch) -> Tensor:
        return torch.stack([noise.abs().mean() for noise in batch.draw.noise])

    alone = held(run).measure(losses, step=0, rank=0, num_processes=1, gather=lambda rows: rows)
    for processes in (2, 4):
        parts = []
        for rank in range(processes):
            with pytest.raises(_Gathered) as gathered:
                held(run).measure(losses, step=0, rank=rank, num_processes=processes, gather=_give)
            parts.append(gathered.value.args[0])
        together = torch.cat(parts)
        found = held(run).measure(
            losses, step=0, rank=0, num_processes=processes, gather=lambda _, together=together: together
        )
        assert found == alone


class _Gathered(Exception):
    """What one process would send to the others."""


def _give(rows: Tensor) -> Tensor:
    raise _Gathered(rows)


def test_a_run_measures_at_start_end_and_between_and_never_trains_on_them(
    config: Configure, train: Train, monkeypatch: pytest.MonkeyPatch
) -> None:
    trained: set[str] = set()
    make = BatchMaker.make

    def spy(self: BatchMaker, step: int, number: int) -> MicroBatch:
        batch = make(self, step, number)
        trained.update(batch.keys)
        return batch

    monkeypatch.setattr(BatchMaker, "make", spy)
    run = config(heldout_count=3, heldout_every_steps=2, heldout_bins=2, max_train_epochs=1, learning_rate=1e-3)
    assert train(run)
    training_set = read_training_set(run)
    kept = {sample.key for bucket in training_set.heldout for sample in training_set.take(bucket)}
    assert len(trained) == 7 and len(kept) == 3 and not trained & kept
    measured = read_heldout(run.out)
    assert [one.step for one in measured] == [0, 2, 4]
    assert all(0.5 < one.loss < 2 for one in measured) and measured[0].loss != measured[-1].loss
    rows = list(csv.reader((run.out / "heldout.csv").read_text().splitlines()))
    assert rows[0] == ["step", "loss", "t0000-0499", "t0500-0999"] and float(rows[1][1]) == measured[0].loss
    charts = "".join(_heldout(run.out))
    assert "after step 0" in charts and "after step 4" in charts and "3 pictures" in charts


def test_a_run_that_holds_nothing_out_measures_nothing(config: Configure, tmp_path: Path) -> None:
    assert not held(config()).is_due(0)
    assert read_heldout(tmp_path) == [] and _heldout(tmp_path) == []
