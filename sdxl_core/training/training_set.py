"""The pictures a run trains on, as meta_lat.json names them. Light: read by the launching process too.

Memory-mapped: 12.4 million samples cost 4 bytes each (their place in their bucket) in every process; keys and texts are
read from the index when a batch needs them.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, overload

import numpy as np
import numpy.typing as npt

from sdxl_core.config import TrainConfig
from sdxl_core.files import digest_of
from sdxl_core.latents.index import LatentIndex
from sdxl_core.training.dataset_index import open_dataset
from sdxl_core.training.heldout_choice import heldout_mask
from sdxl_core.training.order import EpochPlan, Indices

_COLUMNS = ("key", "caption", "tags", "bucket_width_px", "bucket_height_px")
_SIZES = ("bucket_width_px", "bucket_height_px")


@dataclass(frozen=True, slots=True, kw_only=True)
class Sample:
    """One picture. `sentence`, `tags`: "" where there is none.   width_px, height_px: of its bucket."""

    key: str
    sentence: str
    tags: str
    width_px: int
    height_px: int


class TrainingSet:
    """All samples in the order of meta_lat.json, among them those that are held out.

    digest: 64 hex digits over the bytes of the metadata JSON (keys, texts, buckets, order) and, where cache-latents
    made them, the latents' settings.   metadata_sha256: of the JSON alone.
    buckets: (width_px, height_px), ascending.   trained, heldout: for each bucket its samples' numbers, int32 [n].
    """

    def __init__(self, index: LatentIndex, *, heldout: tuple[float, int] = (0.0, 0), seed: int = 0) -> None:
        self._index = index
        self.metadata_sha256 = index.metadata_sha256
        self.digest = digest_of(index.metadata_sha256, index.fingerprint, index.num_rows)
        codes, self.buckets = _bucket_codes(index)
        held = heldout_mask(index, share=heldout[0], count=heldout[1], seed=seed)
        self.trained = _by_bucket(codes, len(self.buckets), None if held is None else ~held)
        self.heldout = () if held is None else _by_bucket(codes, len(self.buckets), held)

    @property
    def num_samples(self) -> int:
        """Trained on and held out."""
        return self._index.num_rows

    @property
    def num_heldout(self) -> int:
        return sum(map(len, self.heldout))

    @property
    def resolution_px(self) -> tuple[int, int]:
        """Width and height that a model trained on these is at home at.

        Of one bucket its own; of several the square, in steps of 64 px, with the area of the one with most pictures:
        what cache-latents was asked for.
        """
        counts = [len(rows) for rows in self.trained]
        width_px, height_px = self.buckets[int(np.argmax(counts))]
        if sum(1 for count in counts if count) == 1:
            return width_px, height_px
        side_px = max(64, 64 * round(math.sqrt(width_px * height_px) / 64))
        return side_px, side_px

    @property
    def samples(self) -> Sequence[Sample]:
        """All samples by number, read when they are asked for."""
        return _Samples(self)

    def take(self, numbers: Sequence[int] | Indices) -> list[Sample]:
        """Samples by number, in the order given. Raises: DataError: the index is damaged there."""
        rows = self._index.take(np.asarray(numbers, np.int64), _COLUMNS)
        return [
            Sample(key=key, sentence=sentence or "", tags=tags or "", width_px=width_px, height_px=height_px)
            for key, sentence, tags, width_px, height_px in zip(
                *(rows[name].to_pylist() for name in _COLUMNS), strict=True
            )
        ]

    def plan(self, config: TrainConfig) -> EpochPlan:
        """How what is trained on becomes batches and steps."""
        return EpochPlan(
            buckets=tuple(bucket for bucket in self.trained if len(bucket)),
            global_batch_size=config.train_batch_size * config.num_processes,
            accumulation_steps=config.gradient_accumulation_steps,
            seed=config.seed,
        )


def read_training_set(config: TrainConfig) -> TrainingSet:
    """Open what `metadata` and `latents` name. Raises: as `open_dataset`."""
    held = (config.heldout_share, config.heldout_count)
    return TrainingSet(open_dataset(config), heldout=held, seed=config.seed)


class _Samples(Sequence[Sample]):
    def __init__(self, training_set: TrainingSet) -> None:
        self._set = training_set

    def __len__(self) -> int:
        return self._set.num_samples

    @overload
    def __getitem__(self, number: int) -> Sample: ...
    @overload
    def __getitem__(self, number: slice) -> Sequence[Sample]: ...
    def __getitem__(self, number: int | slice) -> Sample | Sequence[Sample]:
        if isinstance(number, slice):
            return self._set.take(range(*number.indices(len(self))))
        return self._set.take([number])[0]

    def __iter__(self) -> Iterator[Sample]:
        step = 4096
        for start in range(0, len(self), step):
            yield from self[start : start + step]


def _bucket_codes(index: LatentIndex) -> tuple[npt.NDArray[np.uint16], tuple[tuple[int, int], ...]]:
    """The bucket number of each row, uint16 [N], and the buckets, ascending by width, then height."""
    numbers = np.zeros(1 << 24, np.uint16)  # bucket number + 1 by size; pages that are never touched cost nothing
    packed: list[int] = []
    codes = np.empty(index.num_rows, np.uint16)
    start = 0
    for batch in index.chunks(_SIZES, checked=False):
        width_px, height_px = (batch[name].to_numpy() for name in _SIZES)
        size = (width_px >> 3 & 0xFFF) << 12 | height_px >> 3 & 0xFFF
        found = numbers[size]
        if not found.all():
            for new in np.unique(size[found == 0]).tolist():
                packed.append(new)
                numbers[new] = len(packed)
            found = numbers[size]
        codes[start : start + len(size)] = found - 1
        start += len(size)
    rank = np.argsort(np.argsort(packed)).astype(np.uint16)
    ascending = sorted(packed)
    return rank[codes], tuple(((size >> 12) << 3, (size & 0xFFF) << 3) for size in ascending)


def _by_bucket(codes: npt.NDArray[np.uint16], num_buckets: int, mask: Any) -> tuple[Indices, ...]:
    """The rows of each bucket, ascending, views of one array int32 [rows]. `mask`: bool [N] or None, all rows."""
    piece = 65_536  # sorting what fits the cache is 13 times as quick as sorting all at once
    counts = np.bincount(codes if mask is None else codes[mask], minlength=num_buckets)
    ends = np.cumsum(counts)
    places = ends - counts
    rows = np.empty(int(counts.sum()), np.int32)
    for start in range(0, len(codes), piece):
        part = codes[start : start + piece]
        order = np.argsort(part, kind="stable")
        if mask is not None:
            order = order[mask[start : start + piece][order]]
        there = np.bincount(part[order], minlength=num_buckets)
        begin = 0
        for bucket in np.flatnonzero(there):
            count = there[bucket]
            rows[places[bucket] : places[bucket] + count] = order[begin : begin + count] + start
            places[bucket] += count
            begin += count
    return tuple(rows[end - count : end] for end, count in zip(ends, counts, strict=True))
