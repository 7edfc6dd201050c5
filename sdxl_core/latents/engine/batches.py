"""Pictures in order to batches of one bucket: a pure function of a group's pictures."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Protocol, TypeVar

from sdxl_core.buckets import Bucket, BucketChoice


class HasBucket(Protocol):
    @property
    def choice(self) -> BucketChoice: ...


Item = TypeVar("Item", bound=HasBucket)


def batches_of(items: Iterable[Item], batch_size: int) -> Iterator[list[Item]]:
    """A batch as soon as a bucket has `batch_size` items; at the end what is left, in the order of buckets.

    Items keep their order within a bucket. An item is asked for only when the batches before it were taken.
    """
    waiting: dict[Bucket, list[Item]] = {}
    for item in items:
        batch = waiting.setdefault(item.choice.bucket, [])
        batch.append(item)
        if len(batch) == batch_size:
            yield waiting.pop(item.choice.bucket)
    for bucket in sorted(waiting):
        yield waiting[bucket]
