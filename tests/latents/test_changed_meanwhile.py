"""Sources, metadata and listings that change between plan, encoding and join: no key ever gets another's latents."""

import json
import shutil
from typing import Any

import pytest
from support.latent_sets import collection, contents
from support.pictures import encoded, picture

from sdxl_core.config import CacheLatentsConfig, RemoveLatentsConfig
from sdxl_core.errors import ConfigError, DataError
from sdxl_core.latents import plan as planning
from sdxl_core.latents.cache import cache_latents, encode_shard, join_latents, plan_latents
from sdxl_core.latents.index import LatentIndex
from sdxl_core.latents.verify import remove_latents


def reorder(config: CacheLatentsConfig) -> None:
    """The metadata says the same pictures the other way round."""
    told = json.loads(config.metadata.read_text())
    config.metadata.write_text(json.dumps(dict(reversed(told.items()))))


def test_metadata_that_changes_while_latents_are_made_is_told_and_not_joined(make_job: Any) -> None:
    config = make_job(collection(6))
    plan = plan_latents(config)
    for shard in plan.shards:
        encode_shard(shard, config, "cpu")
    reorder(config)
    with pytest.raises(DataError, match=r"meta.json: was changed .* Run the same command again"):
        join_latents(config, plan)
    assert not (config.out / "meta_lat.json").exists()
    cache_latents(config)
    latents = contents(config.out)
    shutil.rmtree(config.out)
    reorder(config)
    cache_latents(config)
    assert contents(config.out) == latents


def test_metadata_that_was_only_copied_is_joined(make_job: Any) -> None:
    config = make_job(collection(4))
    plan = plan_latents(config)
    for shard in plan.shards:
        encode_shard(shard, config, "cpu")
    config.metadata.write_bytes(config.metadata.read_bytes())
    assert join_latents(config, plan).num_kept == 4


def test_removing_after_the_metadata_changed_mixes_nothing(make_job: Any) -> None:
    config = make_job(collection(6))
    cache_latents(config)
    before = contents(config.out)
    reorder(config)
    remove_latents(RemoveLatentsConfig(path=config.out, keys=["000"]))
    assert not LatentIndex.exists(config.out / "latents"), "until the next run no index says what is where"
    cache_latents(config)
    after = contents(config.out)
    assert {key: after[key] for key in after if key != "000"} == {key: before[key] for key in before if key != "000"}


@pytest.mark.parametrize("layout", ["per_image", "packed"])
def test_killed_between_cutting_shards_and_taking_out_what_they_replace(
    make_job: Any, monkeypatch: pytest.MonkeyPatch, layout: str
) -> None:
    config = make_job(collection(6), batch_size=1, layout=layout)
    cache_latents(config)
    (config.source / "000.png").write_bytes(encoded(picture(90, 60, seed=5), "PNG"))

    def killed(*_: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(planning._Held, "supersede", killed)
        cache_latents(config)
    assert cache_latents(config).num_kept == 6
    assert cache_latents(config).num_kept == 6, "the row that was replaced must not come back"


def test_settings_that_were_deleted_do_not_let_others_in(make_job: Any) -> None:
    config = make_job(collection(4))
    cache_latents(config)
    (config.out / "latents" / ".ledger" / "settings.json").unlink()
    with pytest.raises(ConfigError, match=r"settings.json"):
        cache_latents(config.model_copy(update={"seed": 5}))
    assert not (config.out / "latents" / ".ledger" / "settings.json").exists()
    assert cache_latents(config).num_kept == 4
