"""`only_shards`: a set is finished shard by shard, by their numbers, and never taken for whole before it is."""

import json
from pathlib import Path

import pytest

from sdxl_core.config import CacheLatentsConfig, MergeTagsConfig
from sdxl_core.configfile import check
from sdxl_core.demo import draw_samples
from sdxl_core.errors import ConfigError, ShardError
from sdxl_core.latents.cache import cache_latents
from sdxl_core.latents.settings import stored_config
from sdxl_core.merge.plan import merge_tags


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("collection") / "pictures"
    draw_samples(folder)
    return folder


@pytest.fixture
def config(pictures: Path, tmp_path: Path) -> CacheLatentsConfig:
    """50 pictures in five shards of ten."""
    metadata = merge_tags(MergeTagsConfig(source=pictures, out=tmp_path / "meta_cap_dd.json")).path
    return CacheLatentsConfig(
        source=pictures, metadata=metadata, out=tmp_path, vae="tiny", resolution_px=128, min_bucket_px=64,
        max_bucket_px=256, shard_size=10, devices="cpu",
    )  # fmt: skip


def only(config: CacheLatentsConfig, *numbers: int) -> CacheLatentsConfig:
    return config.model_copy(update={"only_shards": numbers})


def latents_in(out: Path) -> dict[str, int]:
    return {path.name: path.stat().st_mtime_ns for path in (out / "latents").glob("*.npz")}


def test_only_these_shards_are_encoded_and_the_set_is_joined_when_none_is_left(config: CacheLatentsConfig) -> None:
    with pytest.raises(ShardError, match=r"only_shards \(3, 1\) are finished. Of all 5, 3 are not: 0, 2, 4\."):
        cache_latents(only(config, 3, 1))
    begun = latents_in(config.out)
    assert 0 < len(begun) <= 20 and not (config.out / "meta_lat.json").exists()
    ref = cache_latents(only(config, 0, 2, 4))
    assert ref.num_kept + ref.num_rejected == ref.num_seen and ref.num_kept == len(latents_in(config.out))
    assert len(json.loads((config.out / "meta_lat.json").read_bytes())) == ref.num_kept
    assert begun.items() <= latents_in(config.out).items(), "what was there was written again"
    assert cache_latents(config) == ref
    assert stored_config(config.out / "latents").only_shards == ()


def test_a_lost_file_of_another_shard_is_told_and_left(config: CacheLatentsConfig) -> None:
    cache_latents(config)
    was = (config.out / "meta_lat.json").read_bytes()
    lost = sorted(latents_in(config.out))[0]
    (config.out / "latents" / lost).unlink()
    with pytest.raises(ShardError, match=r"Of all 5, 1 are not: 0\."):
        cache_latents(only(config, 4))
    assert lost not in latents_in(config.out) and (config.out / "meta_lat.json").read_bytes() == was
    cache_latents(only(config, 0))
    assert lost in latents_in(config.out)


def test_a_number_that_no_shard_has_is_refused(config: CacheLatentsConfig) -> None:
    with pytest.raises(ConfigError, match=r"only_shards = 1, 5: there is no shard 5\..* 5 shards, numbered from 0"):
        cache_latents(only(config, 1, 5))
    assert not latents_in(config.out)


def test_a_number_below_zero_is_refused_by_its_name(config: CacheLatentsConfig) -> None:
    with pytest.raises(ConfigError, match=r"only_shards\.0 = -1"):
        check(CacheLatentsConfig, config.model_dump() | {"only_shards": [-1]}, where="here")
