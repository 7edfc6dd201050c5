"""Sources, metadata and listings that change between plan, encoding and join: no key ever gets another's latents."""

import json
import os
import shutil
import threading
from functools import partial
from pathlib import Path
from typing import Any

import orjson
import pytest
import torch
from support.latent_sets import collection, committed, contents, snapshot
from support.pictures import encoded, picture
from support.tars import write_tar

from sdxl_core.catalog.build import build_catalog
from sdxl_core.catalog.config import CatalogConfig, CatalogSource
from sdxl_core.config import CacheLatentsConfig, RemoveLatentsConfig, VerifyLatentsConfig
from sdxl_core.devices import Slots
from sdxl_core.errors import ConfigError, DataError, LockedError
from sdxl_core.latents import cache, encode
from sdxl_core.latents import plan as planning
from sdxl_core.latents.cache import cache_latents, encode_shard, join_latents, plan_latents
from sdxl_core.latents.engine import Engine
from sdxl_core.latents.index import LatentIndex
from sdxl_core.latents.metadata import blocks
from sdxl_core.latents.remove import remove_latents
from sdxl_core.latents.vae import EncodeFunction, load_encoder
from sdxl_core.latents.verify import verify_latents
from sdxl_core.lock import LOCK_NAME, held_token, output_lock
from sdxl_core.rejected import read_rejected


def reorder(config: CacheLatentsConfig) -> None:
    """The metadata says the same pictures the other way round."""
    told = json.loads(config.metadata.read_text())
    config.metadata.write_text(json.dumps(dict(reversed(told.items()))))


def test_metadata_that_changes_while_latents_are_made_is_told_and_not_joined(make_job: Any) -> None:
    config = make_job(collection(6))
    plan = plan_latents(config)
    for shard in plan.shards:
        encode_shard(shard, config, "cpu", "")
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
        encode_shard(shard, config, "cpu", "")
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


@pytest.mark.parametrize("layout", ["per_image", "packed"])
def test_a_picture_that_could_not_be_read_is_encoded_once_it_can(make_job: Any, layout: str) -> None:
    config = make_job(collection(6), batch_size=2, layout=layout)
    whole = cache_latents(config.model_copy(update={"out": config.out / "whole"}))
    plan = plan_latents(config)
    (config.source / "000.png").rename(config.out / "elsewhere.png")
    for shard in plan.shards:
        encode_shard(shard, config, "cpu", "")
    (config.out / "elsewhere.png").rename(config.source / "000.png")
    ref = cache_latents(config)
    assert (ref.num_kept, ref.num_rejected) == (whole.num_kept, whole.num_rejected)
    assert "000" in contents(config.out) and list(contents(config.out)) == list(contents(config.out / "whole"))
    assert cache_latents(config).num_kept == ref.num_kept


def test_a_source_that_vanishes_while_it_is_read_rejects_nothing(make_job: Any) -> None:
    config = make_job(collection(6), commit_size=2)
    plan = plan_latents(config)
    config.source.rename(config.source.with_name("unplugged"))
    with pytest.MonkeyPatch.context() as patch, pytest.raises(ConfigError, match="is its disk mounted"):
        checks: list[int] = []

        def only_later(self: Any, check: Any = encode._ShardEncoder._check_roots) -> None:
            checks.append(1)
            if len(checks) > 1:
                check(self)

        patch.setattr(encode._ShardEncoder, "_check_roots", only_later)
        encode_shard(plan.shards[0], config, "cpu", "")
    config.source.with_name("unplugged").rename(config.source)
    assert cache_latents(config).num_rejected == 0


def test_a_tar_that_is_replaced_gives_no_other_picture(make_job: Any, tmp_path: Path) -> None:
    names = ["1.png", "2.png"]
    pictures = [encoded(picture(64, 64, seed=seed), "PNG") for seed in (1, 2)]
    config = make_job(dict(zip(names, pictures, strict=True)))
    tar = tmp_path / "tars" / "0000.tar"
    tar.parent.mkdir()
    write_tar(tar, list(zip(names, pictures, strict=True)))
    build_catalog(CatalogConfig(sources=[CatalogSource(path=tar.parent)], out=tmp_path / "catalog"))
    config = config.model_copy(update={"source": tmp_path / "catalog"})
    plan = plan_latents(config)
    write_tar(tar, list(zip(reversed(names), reversed(pictures), strict=True)))
    os.utime(tar, ns=(1, 1))
    with pytest.raises(DataError, match="Build the catalog again"):
        encode_shard(plan.shards[0], config, "cpu", "")


@pytest.mark.parametrize("options", [{"npz_naming": "size"}, {"npz_naming": "stem"}, {"layout": "packed"}])
def test_names_that_the_file_system_has_no_room_for_cost_their_pictures(make_job: Any, options: dict[str, Any]) -> None:
    some = encoded(picture(64, 64, seed=1), "PNG")
    names = ["a.png", f"{'x' * 250}.png", "b.npz/c.png", "b.png", "z.png"]
    config = make_job(dict.fromkeys(names, some), batch_size=4, **options)
    ref = cache_latents(config)
    rejected = [row.key for row in read_rejected(ref.rejected)]
    expected = {"size": ["x" * 250], "stem": ["b"]}.get(options.get("npz_naming", ""), [])
    assert rejected == expected and ref.num_kept == 5 - len(expected)
    assert cache_latents(config).num_kept == ref.num_kept
    verify_latents(VerifyLatentsConfig(path=config.out))


def test_a_file_too_large_for_a_picture_is_not_read(make_job: Any) -> None:
    config = make_job(collection(2))
    victim = sorted(config.source.glob("*.png"))[0]
    os.truncate(victim, 3 * 2**30)
    ref = cache_latents(config)
    assert [(row.key, row.reason) for row in read_rejected(ref.rejected)] == [(victim.stem, "too_large")]


@pytest.mark.parametrize("text", ['"a": {\n  }', '"a": {\n    "train_resolution": null\n  }', '"a": {}'])
def test_any_entry_gets_its_resolution_as_json_has_it(tmp_path: Path, text: str) -> None:
    (tmp_path / "meta.json").write_text('{\n  "0": {\n    "tags": "x"\n  },\n  ' + text + "\n}")
    (block,) = blocks(tmp_path / "meta.json")
    assert block.is_indented
    told = b"{\n" + block.with_resolution(1, 64, 32) + b"\n}"
    assert told.decode() == json.dumps({"a": {"train_resolution": [64, 32]}}, indent=2)


def test_an_error_does_not_wait_for_the_other_devices(make_job: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    config = make_job(collection(6), shard_size=3, devices="cpu,cpu")
    ended = threading.Event()

    def work(shard: Any, config: Any, slots: Slots) -> None:
        if shard.index == 0:
            raise ConfigError("of the first device")
        while not slots.slots[1]._closed:
            assert not ended.wait(0.05), "the second device was waited for"

    monkeypatch.setattr(cache, "encode_shard_in_slots", work)
    timer = threading.Timer(240, ended.set)
    timer.start()
    with pytest.raises(ConfigError, match="of the first device"):
        cache_latents(config)
    timer.cancel()
    assert not ended.is_set()


@pytest.mark.parametrize("data", ['{"a": {"tags": "é"}}'.encode("latin-1"), b'{"a": {"x":' + b"[" * 5000 + b"]" * 5000])
def test_metadata_of_another_encoding_or_endless_depth_is_told(tmp_path: Path, data: bytes) -> None:
    (tmp_path / "meta.json").write_bytes(data + b"}}")
    with pytest.raises(DataError, match="not valid JSON"):
        list(blocks(tmp_path / "meta.json"))


def test_a_file_in_the_place_of_the_output_is_told(make_job: Any) -> None:
    config = make_job(collection(2))
    with pytest.raises(ConfigError, match="cannot be made a folder"):
        cache_latents(config.model_copy(update={"out": config.metadata}))


@pytest.mark.parametrize("layout", ["per_image", "packed"])
def test_who_lost_the_lock_records_nothing_more(make_job: Any, monkeypatch: Any, layout: str) -> None:
    """A machine that slept for an hour: another process took over, and this one is in the middle of a group."""
    config = make_job(collection(12), commit_size=4, batch_size=2, layout=layout)
    calm = config.model_copy(update={"out": config.out.parent / "calm"})
    cache_latents(calm)
    lock = config.out / "latents" / LOCK_NAME
    encoded: list[int] = []

    def load(vae: str, dtype: str, device: torch.device) -> EncodeFunction:
        encode_pixels = load_encoder(vae, dtype, device)

        def taken_over(pixels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            encoded.append(len(pixels))
            if sum(encoded) > 4:
                lock.write_bytes(orjson.dumps({"token": "of another", "host": "elsewhere"}))
            return encode_pixels(pixels)

        return taken_over

    with monkeypatch.context() as patch:
        patch.setattr(encode, "Engine", partial(Engine, load=load))
        with pytest.raises(LockedError, match=r"took over.*Nothing was recorded since"):
            cache_latents(config)
    assert committed(config.out) == 4 and sum(encoded) < 12
    assert orjson.loads(lock.read_bytes())["token"] == "of another", "it is not ours to remove"
    lock.unlink()
    cache_latents(config)
    assert snapshot(config.out) == snapshot(calm.out)


def test_a_process_that_works_for_another_goes_by_the_lock_of_that_one(make_job: Any) -> None:
    config = make_job(collection(3))
    with output_lock(config.out / "latents", purpose="test"):
        (shard,) = plan_latents(config).shards
        with pytest.raises(LockedError, match="took over"):
            encode_shard(shard, config, "cpu", "the token of a lock that was lost")
        assert committed(config.out) == 0
        token = held_token(config.out / "latents")
        assert encode_shard(shard, config, "cpu", token).num_kept == 3
    assert held_token(config.out / "latents") == ""
