"""Learning-rate schedules are the libraries', as plain functions of the step."""

from typing import Any

import pytest
import torch
from torch import nn
from transformers.optimization import get_wsd_schedule

from sdxl_core.config import TrainOptions
from sdxl_core.config.train.optimizer import ScheduleName
from sdxl_core.training.schedules import Schedule, lr_schedule

WARMUP, TOTAL = 4, 20


def reference_factors(scheduler: Any) -> list[float]:
    return [scheduler.lr_lambdas[0](step) for step in range(TOTAL + 3)]


def holder(rate: float = 1.0) -> torch.optim.Optimizer:
    return torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=rate)


@pytest.mark.parametrize("warmup", [0, WARMUP])
@pytest.mark.parametrize("name", ["constant", "constant_with_warmup", "linear", "cosine"])
def test_plain_schedules_are_diffusers(name: ScheduleName, warmup: int) -> None:
    from diffusers.optimization import get_scheduler

    reference = get_scheduler(name, holder(), num_warmup_steps=warmup, num_training_steps=TOTAL)
    ours = Schedule(name=name, warmup_steps=warmup, total_steps=TOTAL)
    expected = reference_factors(reference)
    if name == "cosine":
        expected[TOTAL + 1 :] = [0.0, 0.0]  # diffusers' cosine climbs again behind the end of training
    assert [ours(step) for step in range(TOTAL + 3)] == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize("cycles", [1, 3])
def test_cosine_with_restarts_is_diffusers(cycles: int) -> None:
    from diffusers.optimization import get_cosine_with_hard_restarts_schedule_with_warmup

    reference = get_cosine_with_hard_restarts_schedule_with_warmup(holder(), WARMUP, TOTAL, num_cycles=cycles)
    ours = Schedule(name="cosine_with_restarts", warmup_steps=WARMUP, total_steps=TOTAL, num_cycles=cycles)
    assert [ours(step) for step in range(TOTAL + 3)] == pytest.approx(reference_factors(reference), abs=1e-12)


@pytest.mark.parametrize("power", [1.0, 2.5])
def test_polynomial_is_diffusers(power: float) -> None:
    from diffusers.optimization import get_polynomial_decay_schedule_with_warmup

    rate = 1e-5
    reference = get_polynomial_decay_schedule_with_warmup(holder(rate), WARMUP, TOTAL, lr_end=0.1 * rate, power=power)
    ours = Schedule(name="polynomial", warmup_steps=WARMUP, total_steps=TOTAL, power=power, min_factor=0.1)
    assert [ours(step) for step in range(TOTAL + 3)] == pytest.approx(reference_factors(reference), abs=1e-9)


def test_warmup_stable_decay_is_transformers() -> None:
    reference = get_wsd_schedule(holder(), WARMUP, 6, num_training_steps=TOTAL, min_lr_ratio=0.1)
    ours = Schedule(
        name="warmup_stable_decay", warmup_steps=WARMUP, total_steps=TOTAL, decay_steps=6, min_factor=0.1
    )  # fmt: skip
    assert [ours(step) for step in range(TOTAL + 3)] == pytest.approx(reference_factors(reference), abs=1e-12)


def test_lengths_may_be_shares_of_all_steps() -> None:
    options = TrainOptions(lr_scheduler="warmup_stable_decay", lr_warmup_steps=0.1, lr_decay_steps=0.25)
    schedule = lr_schedule(options, total_steps=200)
    assert (schedule.warmup_steps, schedule.decay_steps) == (20, 50)
    assert lr_schedule(TrainOptions(lr_scheduler="cosine", lr_warmup_steps=7), total_steps=200).warmup_steps == 7


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"lr_warmup_steps": 5}, "constant has no warm-up; choose constant_with_warmup"),
        ({"lr_scheduler": "cosine", "lr_decay_steps": 5}, "belongs to warmup_stable_decay"),
        ({"lr_scheduler": "warmup_stable_decay"}, "needs lr_decay_steps"),
    ],
)
def test_lengths_that_a_schedule_ignores_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        TrainOptions(**changes)
