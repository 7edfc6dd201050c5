"""Map a task over shards with a bound on how many are under way, and say what failed only when all have ended."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

from prefect.futures import PrefectFuture

from sdxl_core.errors import ShardError
from tasks.artifacts import show_failed_shards

T = TypeVar("T")


class Gathered(list[T]):
    """Results in the order of the shards. `states`: how each shard ended, by Prefect's name (Completed, Cached)."""

    states: list[str]


def gather(submit: Callable[[Any], PrefectFuture[T]], shards: Sequence[Any], *, limit: int) -> Gathered[T]:
    """`submit` every shard, at most `limit` at a time; shards have an `index`, their number for people.

    One failed shard does not keep the others from finishing.
    Raises: the failure itself where it is the only kind; ShardError naming every failed shard where several differ.
    """
    free = threading.Semaphore(limit)
    futures = []
    for shard in shards:
        free.acquire()
        future = submit(shard)
        future.add_done_callback(lambda _: free.release())
        futures.append(future)
    results = Gathered[T]()
    failures: dict[int, Exception] = {}
    for shard, future in zip(shards, futures, strict=True):
        try:
            results.append(future.result())
        except Exception as error:  # whatever ended it, the other shards are asked too
            failures[shard.index] = error
    if failures:
        show_failed_shards({number: str(error) for number, error in failures.items()}, num_shards=len(futures))
        first = next(iter(failures.values()))
        if len({str(error) for error in failures.values()}) == 1:
            raise first
        text = "\n".join(f"  shard {number}: {error}" for number, error in failures.items())
        raise ShardError(
            f"{len(failures)} of {len(futures)} shards failed; the others are finished and kept. Retry this run, or "
            f"start it again: only these are worked on.\n{text}"
        )
    results.states = [future.state.name or "" for future in futures]
    return results
