"""What is trained on: rows of an index, grouped by bucket, some of them held out."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import orjson
import pytest
from pydantic import ValidationError
from support.epochs import plan_epochs

from sdxl_core.config import TrainConfig
from sdxl_core.errors import ConfigError, DataError
from sdxl_core.files import sha256_file
from sdxl_core.latents.index import ROWS, IndexWriter, LatentIndex
from sdxl_core.training import dataset_index, training_set
from sdxl_core.training.dataset_index import stream_metadata
from sdxl_core.training.order import batches_of_epoch
from sdxl_core.training.training_set import TrainingSet, read_training_set

Configure = Callable[..., TrainConfig]


def write_index(folder: Path, buckets: list[tuple[int, int]], *, metadata_sha256: str = "s") -> LatentIndex:
    folder.mkdir(parents=True, exist_ok=True)
    count = len(buckets)
    zeros: dict[str, Any] = {f.name: np.zeros(count, f.type.to_pandas_dtype()) for f in ROWS if not f.nullable}
    sides = np.array(buckets, np.int32).reshape(-1, 2)
    with IndexWriter(folder, fingerprint="f", made_from="m") as writer:
        columns = zeros | {"key": [f"k{i}" for i in range(count)], "tags": [f"t{i}" for i in range(count)]}
        writer.add(columns | {"bucket_width_px": sides[:, 0], "bucket_height_px": sides[:, 1]})
        writer.finish(metadata_sha256=metadata_sha256)
    return LatentIndex.open(folder)


def numbers(groups: tuple[Any, ...]) -> list[int]:
    return sorted(int(i) for group in groups for i in group)


def test_samples_are_grouped_by_bucket_as_a_list_of_them_would_be(tmp_path: Path) -> None:
    rng = np.random.default_rng(1)
    sides = [(64, 64), (1024, 64), (64, 1024), (8, 16384), (16384, 8), (832, 1216), (1216, 832)]
    buckets = [sides[i] for i in rng.integers(0, len(sides), 150_000)]
    found = TrainingSet(write_index(tmp_path, buckets))
    expected = plan_epochs(buckets, global_batch_size=4, accumulation_steps=1, seed=0)
    assert found.buckets == tuple(sorted(sides)) and not found.heldout
    assert all((one == other).all() for one, other in zip(found.trained, expected.buckets, strict=True))
    assert found.trained[0].dtype == np.int32
    assert (found.samples[7].key, found.samples[7].tags, found.samples[7].sentence) == ("k7", "t7", "")
    assert [sample.key for sample in found.take([70_000, 3, 149_999])] == ["k70000", "k3", "k149999"]


@pytest.mark.parametrize(
    ("buckets", "expected"),
    [
        ({(1216, 832): 3}, (1216, 832)),
        ({(832, 1216): 5, (1216, 832): 3, (1024, 1024): 2}, (1024, 1024)),
        ({(512, 512): 2, (384, 640): 3}, (512, 512)),
        ({(1024, 1024): 1, (768, 768): 2}, (768, 768)),
    ],
)
def test_a_model_says_the_resolution_that_it_was_trained_at(
    tmp_path: Path, buckets: dict[tuple[int, int], int], expected: tuple[int, int]
) -> None:
    rows = [bucket for bucket, count in buckets.items() for _ in range(count)]
    assert TrainingSet(write_index(tmp_path, rows)).resolution_px == expected


def test_held_out_samples_are_never_trained_on_and_follow_from_their_keys(tmp_path: Path) -> None:
    buckets = [((64, 64), (64, 128))[i % 2] for i in range(2000)]
    index = write_index(tmp_path, buckets)
    share = TrainingSet(index, heldout=(0.1, 0), seed=3)
    held = numbers(share.heldout)
    assert 150 < len(held) < 250 and share.num_heldout == len(held)
    assert sorted(held + numbers(share.trained)) == list(range(2000))
    assert all(buckets[i] == share.buckets[b] for b, group in enumerate(share.heldout) for i in group)
    exact = TrainingSet(index, heldout=(0.0, 37), seed=3)
    assert exact.num_heldout == 37 and set(numbers(exact.heldout)) < set(held), "the same samples come first"
    assert numbers(TrainingSet(index, heldout=(0.1, 0), seed=4).heldout) != held
    fewer = TrainingSet(write_index(tmp_path / "fewer", buckets[:1500]), heldout=(0.1, 0), seed=3)
    assert numbers(fewer.heldout) == [i for i in held if i < 1500], "other pictures do not matter"


def test_holding_out_everything_is_refused(config: Configure) -> None:
    with pytest.raises(ConfigError, match="heldout_count = 10, but there are 10 pictures"):
        read_training_set(config(heldout_count=10))
    with pytest.raises(ValidationError, match="give one of them"):
        config(heldout_count=1, heldout_share=0.1)


def test_a_cache_of_sd_scripts_gets_an_index_in_the_run_folder_once(
    config: Configure, make_latents: Callable[..., tuple[Path, Path]], tmp_path: Path
) -> None:
    metadata, latents = make_latents(tmp_path / "theirs", num_samples=7)
    run = config(metadata=metadata, latents=latents)
    before = sorted(latents.iterdir())
    first = read_training_set(run)
    end = run.out / "state" / "dataset" / "index.json"
    made_ns = end.stat().st_mtime_ns
    assert first.num_samples == 7 and sorted(latents.iterdir()) == before, "their folder is not written to"
    assert read_training_set(run).digest == first.digest and end.stat().st_mtime_ns == made_ns
    end.write_bytes(end.read_bytes()[:-9])
    assert read_training_set(run).digest == first.digest, "a damaged one is made again"
    entries = orjson.loads(metadata.read_bytes())
    entries["pic00"]["tags"] = "another"
    metadata.write_bytes(orjson.dumps(entries))
    again = read_training_set(run)
    assert again.samples[0].tags == "another" and again.digest != first.digest


def test_a_caches_own_index_is_used_while_it_is_of_this_metadata(
    config: Configure, make_latents: Callable[..., tuple[Path, Path]], tmp_path: Path
) -> None:
    metadata, latents = make_latents(tmp_path / "ours", num_samples=3)
    run = config(metadata=metadata, latents=latents)
    write_index(latents, [(64, 64)] * 3, metadata_sha256=sha256_file(metadata))
    assert [sample.key for sample in read_training_set(run).samples] == ["k0", "k1", "k2"]
    assert not (run.out / "state").exists()
    metadata.write_bytes(metadata.read_bytes() + b"\n")
    assert not dataset_index._is_of(LatentIndex.open(latents), run), "its texts may be others"


@pytest.mark.parametrize("layout", [orjson.OPT_INDENT_2, 0])
def test_a_large_metadata_file_is_read_in_parts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, layout: int) -> None:
    entries = {f"a{i}": {"tags": f'x, "{i}", }}{{', "train_resolution": [64, 128]} for i in range(3000)}
    path = tmp_path / "meta_lat.json"
    path.write_bytes(orjson.dumps(entries, option=layout))
    monkeypatch.setattr(dataset_index, "SMALL_BYTES", 1000)
    monkeypatch.setattr(dataset_index, "_RANGE_BYTES", 20_000)
    parts = list(stream_metadata(path))
    assert len(parts) > 3 and {key: entry for part in parts for key, entry in part.items()} == entries
    path.write_bytes(path.read_bytes()[:-200])
    with pytest.raises(DataError, match="not valid JSON"):
        list(stream_metadata(path))


def test_the_order_needs_no_object_a_sample(tmp_path: Path) -> None:
    import tracemalloc

    found = TrainingSet(write_index(tmp_path, [(64, 64), (64, 128)] * 100_000))
    plan = found.plan(TrainConfig(metadata=tmp_path, latents=tmp_path, out=tmp_path))
    tracemalloc.start()
    order = batches_of_epoch(plan, 0)
    order[0], order[-1]
    held, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert held < 10 * 200_000, "two arrays of int32 and little else"


def test_an_empty_metadata_file_is_refused(config: Configure, tmp_path: Path) -> None:
    path = tmp_path / "meta_lat.json"
    path.write_bytes(b"{}")
    with pytest.raises(DataError, match="holds no picture"):
        training_set.read_training_set(config(metadata=path))
