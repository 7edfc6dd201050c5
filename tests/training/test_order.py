"""The order of an epoch is a pure function of (seed, epoch), whatever runs it."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from support.epochs import plan_epochs

from sdxl_core.training import randomness
from sdxl_core.training.order import batches_of_epoch, position_of_step, samples_of_rank
from sdxl_core.training.randomness import permutation, random_words

BUCKETS = st.lists(st.sampled_from([(64, 64), (64, 128), (128, 64)]), min_size=1, max_size=60)
SIZES = st.integers(1, 9)


@given(bucket_of=BUCKETS, size=SIZES, epoch=st.integers(0, 3), seed=st.integers(0, 2**63 - 1))
def test_an_epoch_shows_every_sample_once_in_bucket_pure_batches(
    bucket_of: list[tuple[int, int]], size: int, epoch: int, seed: int
) -> None:
    plan = plan_epochs(bucket_of, global_batch_size=size, accumulation_steps=1, seed=seed)
    batches = batches_of_epoch(plan, epoch)
    assert sorted(int(i) for batch in batches for i in batch) == list(range(len(bucket_of)))
    assert all(len({bucket_of[i] for i in batch}) == 1 and 1 <= len(batch) <= size for batch in batches)
    assert len(batches) == plan.num_batches
    short = [bucket_of[batch[0]] for batch in batches if len(batch) < size]
    assert len(short) == len(set(short)), "at most one partial batch a bucket"


@given(bucket_of=BUCKETS, size=SIZES, accumulation=st.integers(1, 4), epochs=st.integers(1, 3))
def test_steps_cover_each_epoch_exactly(
    bucket_of: list[tuple[int, int]], size: int, accumulation: int, epochs: int
) -> None:
    plan = plan_epochs(bucket_of, global_batch_size=size, accumulation_steps=accumulation, seed=0)
    positions = [position_of_step(plan, step) for step in range(epochs * plan.num_steps)]
    seen = [(epoch, micro) for epoch, micros in positions for micro in micros]
    assert seen == [(epoch, micro) for epoch in range(epochs) for micro in range(plan.num_batches)]
    assert all(1 <= len(micros) <= accumulation for _, micros in positions)


@given(bucket_of=BUCKETS, processes=st.sampled_from([1, 2, 3, 4]), micro=st.integers(1, 3))
def test_processes_share_a_global_batch_without_gap_or_overlap(
    bucket_of: list[tuple[int, int]], processes: int, micro: int
) -> None:
    plan = plan_epochs(bucket_of, global_batch_size=processes * micro, accumulation_steps=1, seed=3)
    for batch in batches_of_epoch(plan, 0):
        parts = [samples_of_rank(batch, rank=rank, num_processes=processes) for rank in range(processes)]
        assert sorted(int(i) for part in parts for i in part) == sorted(int(i) for i in batch)
        assert max(map(len, parts)) <= micro


def test_epochs_and_seeds_differ_and_repeat_exactly() -> None:
    bucket_of = [(64, 64)] * 40

    def order(seed: int, epoch: int) -> list[list[int]]:
        plan = plan_epochs(bucket_of, global_batch_size=4, accumulation_steps=1, seed=seed)
        return [batch.tolist() for batch in batches_of_epoch(plan, epoch)]

    assert order(0, 0) == order(0, 0)
    assert len({str(order(seed, epoch)) for seed in range(3) for epoch in range(3)}) == 9


def test_the_order_is_the_same_in_every_release() -> None:
    """Resuming after an upgrade needs this: the numbers come from raw Philox words, not from numpy's distributions."""
    plan = plan_epochs([(64, 64)] * 6 + [(64, 128)] * 3, global_batch_size=2, accumulation_steps=1, seed=7)
    assert [batch.tolist() for batch in batches_of_epoch(plan, 1)] == [[2, 4], [6], [7, 8], [3, 1], [5, 0]]


def test_a_position_in_a_large_set_needs_one_epochs_order_only() -> None:
    plan = plan_epochs([(64, 64)] * 1000, global_batch_size=1, accumulation_steps=2, seed=0)
    epoch, micros = position_of_step(plan, 10**12 + 3)
    assert epoch == (10**12 + 3) // 500 and list(micros) == [6, 7]
    assert isinstance(batches_of_epoch(plan, epoch)[6], np.ndarray)


@given(count=st.integers(0, 3000), key=st.integers(0, 2**40))
def test_a_permutation_is_the_stable_argsort_of_its_words(count: int, key: int) -> None:
    expected = np.argsort(random_words(count, key), kind="stable")
    assert permutation(count, key).tolist() == expected.tolist()


def test_words_that_agree_in_their_high_bits_keep_their_order(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ties of the shortened words are settled by the whole words, across the borders of the chunks as well."""
    words = np.random.default_rng(0).integers(0, 1 << 14, 50_000).astype(np.uint64) << np.uint64(2)
    monkeypatch.setattr(randomness, "random_words", lambda count, *_: words.copy())
    monkeypatch.setattr(randomness, "_CHUNK", 7_000)
    assert permutation(len(words), "any").tolist() == np.argsort(words, kind="stable").tolist()


def test_steps_and_batches_are_the_same_on_any_number_of_processes() -> None:
    """At equal global batch: the same steps, and every process's samples together are the same batch."""
    bucket_of = [((64, 64), (64, 128), (128, 64))[i % 3] for i in range(101)]
    plan = plan_epochs(bucket_of, global_batch_size=4, accumulation_steps=3, seed=1)
    for batch in batches_of_epoch(plan, 2):
        for processes in (1, 2, 4):
            parts = [samples_of_rank(batch, rank=rank, num_processes=processes) for rank in range(processes)]
            interleaved = [part[i] for i in range(4) for part in parts if i < len(part)]
            assert interleaved == batch.tolist()
