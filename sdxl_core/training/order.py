"""The order of an epoch is a pure function of (seed, epoch): nothing is consumed, so any position can be jumped to.

Words: a *global micro-batch* is what all processes together see between two accumulations, all of one bucket; an
*optimizer step* is up to `gradient_accumulation_steps` of them and never crosses the end of an epoch.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from sdxl_core.training.randomness import permutation

Indices = npt.NDArray[np.int64]


@dataclass(frozen=True, slots=True, kw_only=True)
class EpochPlan:
    """How samples become batches and steps. `buckets`: for each bucket the indices of its samples, int64 [n].

    `global_batch_size`: samples a global micro-batch (all processes together).
    """

    buckets: tuple[Indices, ...]
    global_batch_size: int
    accumulation_steps: int
    seed: int

    @property
    def num_samples(self) -> int:
        return sum(len(bucket) for bucket in self.buckets)

    @property
    def num_batches(self) -> int:
        """Global micro-batches an epoch, the same in every epoch; the last of a bucket may be partial."""
        return sum(-(-len(bucket) // self.global_batch_size) for bucket in self.buckets)

    @property
    def num_steps(self) -> int:
        """Optimizer steps an epoch."""
        return -(-self.num_batches // self.accumulation_steps)


def plan_epochs(
    bucket_of: Sequence[tuple[int, int]], *, global_batch_size: int, accumulation_steps: int, seed: int
) -> EpochPlan:
    """Group samples by bucket. `bucket_of[i]`: (width_px, height_px) of sample i, as `train_resolution` has it."""
    members: dict[tuple[int, int], list[int]] = {}
    for index, bucket in enumerate(bucket_of):
        members.setdefault(bucket, []).append(index)
    return EpochPlan(
        buckets=tuple(np.array(members[bucket], np.int64) for bucket in sorted(members)),
        global_batch_size=global_batch_size,
        accumulation_steps=accumulation_steps,
        seed=seed,
    )


def batches_of_epoch(plan: EpochPlan, epoch: int) -> list[Indices]:
    """The global micro-batches of one epoch: every sample once, each batch of one bucket, int64 [<= global batch]."""
    batches: list[Indices] = []
    for number, bucket in enumerate(plan.buckets):
        shuffled = bucket[permutation(len(bucket), "samples", plan.seed, epoch, number)]
        size = plan.global_batch_size
        batches += [shuffled[start : start + size] for start in range(0, len(shuffled), size)]
    return [batches[i] for i in permutation(len(batches), "batches", plan.seed, epoch)]


def position_of_step(plan: EpochPlan, step: int) -> tuple[int, range]:
    """Where optimizer step `step` (from 0) is: its epoch (from 0) and its micro-batches within that epoch."""
    epoch, step_in_epoch = divmod(step, plan.num_steps)
    start = step_in_epoch * plan.accumulation_steps
    return epoch, range(start, min(start + plan.accumulation_steps, plan.num_batches))


def samples_of_rank(batch: Indices, *, rank: int, num_processes: int) -> Indices:
    """The part of a global micro-batch that process `rank` computes: every num_processes-th sample, perhaps none.

    No process gets more than ceil(len(batch) / num_processes), so none exceeds its `train_batch_size`.
    """
    return batch[rank::num_processes]
