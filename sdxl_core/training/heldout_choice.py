"""Which samples are never trained on: a function of their keys and the seed, whatever else the collection holds."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from sdxl_core.errors import ConfigError
from sdxl_core.latents.index import LatentIndex
from sdxl_core.training.randomness import random_words

Mask = npt.NDArray[np.bool_]
Words = npt.NDArray[np.uint64]


def heldout_mask(index: LatentIndex, *, share: float, count: int, seed: int) -> Mask | None:
    """The held-out rows, bool [N]; None where none are. A picture that is added or removed moves no other in or out,

    except that a `count` stays a count.

    Raises: ConfigError: nothing would be left to train on.
    """
    if not share and not count:
        return None
    if count >= index.num_rows:
        raise ConfigError(
            f"heldout_count = {count}, but there are {index.num_rows} pictures: nothing would be left to train on. "
            f"Lower it."
        )
    salt = random_words(1, "held out", seed)
    mixed = np.concatenate(
        [_mixed(batch["key_hash"].to_numpy() ^ salt) for batch in index.chunks(["key_hash"], checked=False)]
    )
    limit = np.partition(mixed, count - 1)[count - 1] if count else np.uint64(share * 2.0**64)
    mask: Mask = mixed <= limit if count else mixed < limit
    if mask.all():
        raise ConfigError(f"heldout_share = {share}: nothing would be left of {index.num_rows} pictures. Lower it.")
    return mask


def _mixed(words: Words) -> Words:
    """Every bit of a word depends on all bits of it. Source: splitmix64's finaliser, Steele, Lea, Flood 2014."""
    words = (words ^ words >> np.uint64(30)) * np.uint64(0xBF58476D1CE4E5B9)
    words = (words ^ words >> np.uint64(27)) * np.uint64(0x94D049BB133111EB)
    return words ^ words >> np.uint64(31)
