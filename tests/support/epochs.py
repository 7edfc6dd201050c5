"""An epoch's plan from a list of buckets, for tests that have no training set."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from sdxl_core.training.order import EpochPlan


def plan_epochs(
    bucket_of: Sequence[tuple[int, int]], *, global_batch_size: int, accumulation_steps: int, seed: int
) -> EpochPlan:
    """Group samples by bucket. `bucket_of[i]`: (width_px, height_px) of sample i, as `train_resolution` has it."""
    members: dict[tuple[int, int], list[int]] = {}
    for index, bucket in enumerate(bucket_of):
        members.setdefault(bucket, []).append(index)
    return EpochPlan(
        buckets=tuple(np.array(members[bucket], np.int32) for bucket in sorted(members)),
        global_batch_size=global_batch_size,
        accumulation_steps=accumulation_steps,
        seed=seed,
    )
