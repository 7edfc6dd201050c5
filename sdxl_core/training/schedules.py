"""Learning-rate schedules as plain functions of the step: nothing to save, nothing to resume. Pure.

Each is diffusers' (warmup_stable_decay: transformers') schedule of that name; parity in tests/training.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

from sdxl_core.config.train import TrainOptions
from sdxl_core.config.train.optimizer import OptimizerOptions, ScheduleName


@dataclass(frozen=True, slots=True, kw_only=True)
class Schedule:
    """What shapes the learning rate over a run; all steps are optimizer steps.

    num_cycles: of cosine_with_restarts.   power: of polynomial.   decay_steps: of warmup_stable_decay, at the end.
    min_factor: where polynomial and warmup_stable_decay end, as a share of the learning rate.
    """

    name: ScheduleName
    warmup_steps: int
    total_steps: int
    num_cycles: int = 1
    power: float = 1.0
    decay_steps: int = 0
    min_factor: float = 0.0

    def __call__(self, step: int) -> float:
        """The factor of every learning rate at `step` (from 0), in [0, 1]."""
        if self.name != "constant" and step < self.warmup_steps:
            return self._warming(step / max(1, self.warmup_steps))
        left = max(1, self.total_steps - self.warmup_steps)
        shape = _SHAPES[self.name]
        return shape(self, (step - self.warmup_steps) / left, step)

    def _warming(self, progress: float) -> float:
        start = self.min_factor if self.name == "warmup_stable_decay" else 0.0
        return start + (1.0 - start) * progress


def _restarting(schedule: Schedule, progress: float, _: int) -> float:
    return 0.0 if progress >= 1.0 else _half_cosine((schedule.num_cycles * progress) % 1.0)


def _polynomial(schedule: Schedule, progress: float, _: int) -> float:
    return schedule.min_factor + (1.0 - schedule.min_factor) * math.pow(1.0 - min(1.0, progress), schedule.power)


def _stable_then_decay(schedule: Schedule, _: float, step: int) -> float:
    decayed = (step - (schedule.total_steps - schedule.decay_steps)) / max(1, schedule.decay_steps)
    return schedule.min_factor + (1.0 - schedule.min_factor) * _half_cosine(min(1.0, max(0.0, decayed)))


def _half_cosine(progress: float) -> float:
    return 0.5 * (1.0 + math.cos(math.pi * progress))


_SHAPES: dict[ScheduleName, Callable[[Schedule, float, int], float]] = {
    "constant": lambda schedule, progress, step: 1.0,
    "constant_with_warmup": lambda schedule, progress, step: 1.0,
    "linear": lambda schedule, progress, step: max(0.0, 1.0 - progress),
    "cosine": lambda schedule, progress, step: _half_cosine(min(1.0, progress)),
    "cosine_with_restarts": _restarting,
    "polynomial": _polynomial,
    "warmup_stable_decay": _stable_then_decay,
}


def total_steps(config: TrainOptions, *, steps_per_epoch: int) -> int:
    """Optimizer steps of a whole run."""
    return config.max_train_epochs * steps_per_epoch if config.max_train_epochs else config.max_train_steps


def steps_of(value: float, *, total_steps: int) -> int:
    """A length given in steps, or below 1 as a share of all steps."""
    return int(value * total_steps) if value < 1 else int(value)


def lr_schedule(config: OptimizerOptions, *, total_steps: int) -> Schedule:
    """The schedule of a run of `total_steps`."""
    return Schedule(
        name=config.lr_scheduler,
        warmup_steps=steps_of(config.lr_warmup_steps, total_steps=total_steps),
        total_steps=total_steps,
        num_cycles=config.lr_scheduler_num_cycles,
        power=config.lr_scheduler_power,
        decay_steps=steps_of(config.lr_decay_steps, total_steps=total_steps),
        min_factor=config.lr_scheduler_min_lr_ratio,
    )
