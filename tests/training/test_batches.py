"""What the processes of a run see together, whatever their number."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from sdxl_core.config import ConvertLatentsConfig, ImportLatentsConfig, TrainConfig
from sdxl_core.errors import DataError
from sdxl_core.latents.convert.importing import import_latents
from sdxl_core.latents.convert.layouts import convert_latents
from sdxl_core.training.batches import BatchMaker
from sdxl_core.training.training_set import read_training_set

Configure = Callable[..., TrainConfig]
GLOBAL_BATCH = 4
SHARED: dict[str, Any] = {
    "gradient_accumulation_steps": 2, "shuffle_caption": True, "caption_dropout_rate": 0.3, "noise_offset": 0.1,
    "heldout_count": 1,
}  # fmt: skip


def makers(config: Configure, *, num_processes: int) -> list[BatchMaker]:
    run = config(**SHARED, num_processes=num_processes, train_batch_size=GLOBAL_BATCH // num_processes)
    training_set = read_training_set(run)
    return [BatchMaker(training_set, training_set.plan(run), run, rank=rank) for rank in range(num_processes)]


def seen(config: Configure, *, num_processes: int, num_steps: int) -> list[dict[str, tuple[bytes, ...]]]:
    """Of every global micro-batch: all that a sample brings into the step, by key, from whichever process had it."""
    ranks = makers(config, num_processes=num_processes)
    found = []
    for step in range(num_steps):
        for number in range(ranks[0].num_batches(step)):
            samples: dict[str, tuple[bytes, ...]] = {}
            for maker in ranks:
                batch = maker.make(step, number)
                assert len(batch.keys) <= GLOBAL_BATCH // num_processes
                for i, key in enumerate(batch.keys[: batch.num_counted]):
                    assert key not in samples, "no sample is computed twice"
                    parts = (
                        batch.latents,
                        batch.draw.noise,
                        batch.draw.timesteps,
                        batch.clip_l,
                        batch.clip_g,
                        batch.time_ids,
                    )
                    samples[key] = tuple(part[i].numpy().tobytes() for part in parts)
            found.append(samples)
    return found


def test_one_two_and_four_processes_see_the_same_batches(config: Configure) -> None:
    """Two epochs with partial batches: the same steps, and bit for bit the same samples in each of them."""
    alone = makers(config, num_processes=1)[0]
    num_steps = 2 * alone.plan.num_steps
    expected = seen(config, num_processes=1, num_steps=num_steps)
    assert sorted(key for batch in expected[: len(expected) // 2] for key in batch) == sorted(
        sample.key for bucket in alone.training_set.trained for sample in alone.training_set.take(bucket)
    ), "every sample once an epoch, the partial batches too"
    assert {len(batch) for batch in expected} > {GLOBAL_BATCH}
    for num_processes in (2, 4):
        assert makers(config, num_processes=num_processes)[0].plan.num_steps == alone.plan.num_steps
        assert seen(config, num_processes=num_processes, num_steps=num_steps) == expected


def test_a_latent_file_that_is_damaged_under_way_is_named(
    config: Configure, make_latents: Callable[..., tuple[Path, Path]], tmp_path: Path
) -> None:
    metadata, latents = make_latents(tmp_path / "torn", num_samples=3)
    run = config(metadata=metadata, latents=latents)
    training_set = read_training_set(run)
    maker = BatchMaker(training_set, training_set.plan(run), run, rank=0)
    for path in latents.glob("*.npz"):
        whole = bytearray(path.read_bytes())
        whole[400] ^= 4
        path.write_bytes(bytes(whole))
    with pytest.raises(DataError, match=r"pic0\d\.npz"):
        maker.make(0, 0)


def test_packed_latents_make_the_same_batches_and_damage_to_them_is_named(
    config: Configure, make_latents: Callable[..., tuple[Path, Path]], tmp_path: Path
) -> None:
    metadata, latents = make_latents(tmp_path / "set", num_samples=6)
    import_latents(ImportLatentsConfig(path=latents, metadata=metadata))
    convert_latents(ConvertLatentsConfig(path=latents, out=tmp_path / "packed", layout="packed"))
    forms = [(metadata, latents), (tmp_path / "packed" / "meta_lat.json", tmp_path / "packed" / "latents")]
    runs = [config(metadata=one, latents=other) for one, other in forms]
    sets = [read_training_set(run) for run in runs]
    maker, packed = (BatchMaker(s, s.plan(run), run, rank=0) for s, run in zip(sets, runs, strict=True))
    for step in range(4):
        one, other = maker.make(step, 0), packed.make(step, 0)
        assert one.keys == other.keys and torch.equal(one.latents, other.latents)
        assert torch.equal(one.time_ids, other.time_ids) and torch.equal(one.draw.noise, other.draw.noise)
    for path in (tmp_path / "packed" / "latents" / "packed").rglob("*.npz"):
        whole = bytearray(path.read_bytes())
        whole[400] ^= 4  # in the latents of its first row
        path.write_bytes(bytes(whole))
    again = BatchMaker(sets[1], sets[1].plan(runs[1]), runs[1], rank=0)
    with pytest.raises(DataError, match=r"packed/.*\.npz"):
        for step in range(maker.plan.num_steps):
            again.make(step, 0)


def test_batches_prepared_ahead_are_those_made_one_by_one(config: Configure) -> None:
    (maker,) = makers(config, num_processes=1)
    ahead = [[batch.keys for batch in step] for step in maker.steps(1, 5)]
    assert ahead == [[maker.make(step, n).keys for n in range(maker.num_batches(step))] for step in range(1, 5)]
    assert isinstance(maker.global_batches(0)[0], np.ndarray)
    assert torch.equal(maker.make(3, 0).draw.noise, maker.make(3, 0).draw.noise)
