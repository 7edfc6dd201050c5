"""Every random number is a function of what it is for: (purpose, seed, epoch, sample), not of what was drawn before."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from sdxl_core.files import digest_of

if TYPE_CHECKING:
    import torch

Key = str | int


def random_words(count: int, *key: Key) -> npt.NDArray[np.uint64]:
    """`count` uniform 64-bit words, uint64 [count]. Raw Philox output, which no numpy release may change."""
    return np.random.Philox(key=int(digest_of(*key)[:32], 16)).random_raw(count)


def permutation(count: int, *key: Key) -> npt.NDArray[np.int64]:
    """A random order of range(count), int64 [count]."""
    return np.argsort(random_words(count, *key), kind="stable")


def uniform(*key: Key) -> float:
    """One number in [0, 1)."""
    return int(random_words(1, *key)[0] >> np.uint64(11)) / 2**53


def torch_generator(*key: Key) -> torch.Generator:
    """A CPU generator that starts where `key` says: the same numbers whatever the training device."""
    import torch

    return torch.Generator("cpu").manual_seed(int(digest_of(*key)[:16], 16) >> 1)
