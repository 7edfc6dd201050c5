"""The order of an epoch is a pure function of (seed, epoch): nothing is consumed, so any position can be jumped to.

Words: a *global micro-batch* is what all processes together see between two accumulations, all of one bucket; an
*optimizer step* is up to `gradient_accumulation_steps` of them and never crosses the end of an epoch.

No object a sample or a batch: an order is two arrays of int32, 100 MB an epoch for 12.4 million batches of one sample.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import overload

import numpy as np
import numpy.typing as npt

from sdxl_core.training.randomness import permutation

Indices = npt.NDArray[np.int32]


@dataclass(frozen=True, kw_only=True)
class EpochPlan:
    """How samples become batches and steps. `buckets`: for each bucket the indices of its samples, int32 [n].

    `global_batch_size`: samples a global micro-batch (all processes together).
    """

    buckets: tuple[Indices, ...]
    global_batch_size: int
    accumulation_steps: int
    seed: int

    @cached_property
    def num_samples(self) -> int:
        return sum(len(bucket) for bucket in self.buckets)

    @cached_property
    def first_batches(self) -> npt.NDArray[np.int64]:
        """Number of the first batch of each bucket before batches are shuffled, and of all batches, [buckets + 1]."""
        sizes = [-(-len(bucket) // self.global_batch_size) for bucket in self.buckets]
        return np.concatenate([[0], np.cumsum(sizes, dtype=np.int64)])

    @property
    def num_batches(self) -> int:
        """Global micro-batches an epoch, the same in every epoch; the last of a bucket may be partial."""
        return int(self.first_batches[-1])

    @property
    def num_steps(self) -> int:
        """Optimizer steps an epoch."""
        return -(-self.num_batches // self.accumulation_steps)


class EpochOrder(Sequence[Indices]):
    """The global micro-batches of one epoch: every sample once, each batch of one bucket, int32 [<= global batch].

    A bucket's samples are put in order when its first batch is asked for.
    """

    def __init__(self, plan: EpochPlan, epoch: int) -> None:
        self._plan, self._epoch = plan, epoch
        self._batches = permutation(plan.num_batches, "batches", plan.seed, epoch)
        self._orders: list[Indices | None] = [None] * len(plan.buckets)

    def __len__(self) -> int:
        return self._plan.num_batches

    @overload
    def __getitem__(self, position: int) -> Indices: ...
    @overload
    def __getitem__(self, position: slice) -> Sequence[Indices]: ...
    def __getitem__(self, position: int | slice) -> Indices | Sequence[Indices]:
        if isinstance(position, slice):
            return [self[i] for i in range(*position.indices(len(self)))]
        plan, batch = self._plan, int(self._batches[position])
        number = int(np.searchsorted(plan.first_batches, batch, "right")) - 1
        start = (batch - int(plan.first_batches[number])) * plan.global_batch_size
        return plan.buckets[number][self._order(number)[start : start + plan.global_batch_size]]

    def __iter__(self) -> Iterator[Indices]:
        return (self[position] for position in range(len(self)))

    def _order(self, number: int) -> Indices:
        """Threads may meet here; both would find the same."""
        order = self._orders[number]
        if order is None:
            plan = self._plan
            order = permutation(len(plan.buckets[number]), "samples", plan.seed, self._epoch, number)
            self._orders[number] = order
        return order


def batches_of_epoch(plan: EpochPlan, epoch: int) -> EpochOrder:
    """The global micro-batches of one epoch; costs one permutation of its batches, whatever is asked for."""
    return EpochOrder(plan, epoch)


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
