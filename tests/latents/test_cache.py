"""The latent cache: right numbers, nothing lost to a kill, nothing redone, every bad picture named."""

import hashlib
import json
import os
import subprocess
import sys
import zipfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution
from support.latent_sets import collection, snapshot
from support.pictures import bomb, encoded, picture

from sdxl_core.buckets import BucketTable
from sdxl_core.config import CacheLatentsConfig
from sdxl_core.errors import ConfigError, DataError, LockedError, ShardError
from sdxl_core.images.decode import decode
from sdxl_core.images.prepare import fit_to_bucket
from sdxl_core.latents import LatentStore, encode, read_per_image
from sdxl_core.latents.cache import cache_latents, encode_shard, plan_latents
from sdxl_core.latents.engine import Engine
from sdxl_core.latents.engine.device import Device
from sdxl_core.latents.engine.records import STAGES
from sdxl_core.latents.formats import PackedFile
from sdxl_core.latents.ledger import CommitGroup, ShardLedger
from sdxl_core.latents.vae import EncodeFunction, load_encoder, posterior_noise
from sdxl_core.lock import output_lock
from sdxl_core.models.load import load_vae
from sdxl_core.rejected import read_rejected


def test_latents_are_the_vaes_posterior_sample_of_the_fitted_pixels(make_job: Any) -> None:
    files = collection(5)
    config = make_job(files, batch_size=1)
    cache_latents(config)
    vae = load_vae("tiny", dtype=torch.float32)
    table = BucketTable.from_options(config)
    for name, data in files.items():
        image = decode(data, compat="default", background="#ffffff")
        choice = table.choose(width_px=image.shape[1], height_px=image.shape[0])
        pixels = torch.from_numpy(fit_to_bucket(image, choice).copy()).permute(2, 0, 1)[None].float() / 255
        with torch.no_grad():
            moments = vae._encode((pixels - 0.5) / 0.5)
        posterior = DiagonalGaussianDistribution(moments)
        noise = posterior_noise(hashlib.sha256(data).digest(), config.seed, *posterior.mean.shape[2:])
        expected = posterior.mean + posterior.std * noise
        record = read_per_image(config.out / "latents" / f"{name.rpartition('.')[0]}.npz")
        torch.testing.assert_close(torch.from_numpy(record.latents), expected[0], rtol=1e-4, atol=1e-4)
        assert record.latents.shape == (4, choice.bucket.height_px // 8, choice.bucket.width_px // 8)
        assert (record.original_width_px, record.original_height_px) == (image.shape[1], image.shape[0])


def test_meta_lat_json_is_what_sd_scripts_writes(make_job: Any) -> None:
    config = make_job(collection(4) | {"bad.png": b"no picture"})
    ref = cache_latents(config)
    metadata = json.loads(config.metadata.read_text())
    del metadata["bad"]
    for key, entry in metadata.items():
        height, width = read_per_image(config.out / "latents" / f"{key}.npz").latents.shape[1:]
        entry["train_resolution"] = (width * 8, height * 8)
    assert (config.out / "meta_lat.json").read_text() == json.dumps(metadata, indent=2)
    assert (ref.num_kept, ref.num_rejected, ref.num_seen, sum(ref.buckets.values())) == (4, 1, 5, 4)


def test_every_bad_picture_is_named_and_the_rest_goes_on(make_job: Any) -> None:
    good = encoded(picture(80, 60), "JPEG")
    files = {
        "good.jpg": good,
        "wrong_extension.png": good,
        "cmyk.jpg": encoded(picture(64, 64).convert("CMYK"), "JPEG"),
        "palette.png": encoded(picture(64, 64, mode="RGBA").quantize(16), "PNG"),
        "sixteen.png": encoded(picture(64, 64).convert("L").convert("I;16"), "PNG"),
        "cut_jpg.jpg": good[: len(good) // 2],
        "cut_png.png": encoded(picture(64, 64), "PNG")[:900],
        "cut_webp.webp": encoded(picture(64, 64), "WEBP")[:400],
        "zero.png": b"",
        "text.png": b"hello",
        "bomb.png": bomb(30_000, 30_000),
        "stripe.png": encoded(picture(4000, 1), "PNG"),
        "wide.png": encoded(picture(4000, 40), "PNG"),
    }
    files["gone.png"] = good
    config = make_job(files)
    (config.source / "gone.png").unlink()
    ref = cache_latents(config)
    assert {row.key: row.reason for row in read_rejected(ref.rejected)} == {
        "cut_jpg": "undecodable",
        "cut_png": "undecodable",
        "cut_webp": "undecodable",
        "zero": "empty_file",
        "text": "undecodable",
        "bomb": "too_large",
        "stripe": "too_small",
        "wide": "extreme_aspect",
        "gone": "missing_image",
    }
    assert sorted(LatentStore(config.out / "latents").keys) == ["cmyk", "good", "palette", "sixteen", "wrong_extension"]
    assert ref.num_kept + ref.num_rejected == ref.num_seen == len(json.loads(config.metadata.read_text()))


def test_a_second_run_opens_no_picture_and_writes_nothing(make_job: Any) -> None:
    config = make_job(collection() | {"bad.png": b"x"}, shard_size=5)
    first = cache_latents(config)
    before = {path: path.stat().st_mtime_ns for path in config.out.rglob("*") if path.is_file()}
    opened: list[str] = []
    active = [True]

    def audit(event: str, arguments: tuple[Any, ...]) -> None:
        if active[0] and event == "open" and str(arguments[0]).startswith(str(config.source)):
            opened.append(str(arguments[0]))

    sys.addaudithook(audit)
    assert cache_latents(config) == first
    active[0] = False
    assert opened == []
    assert {path: path.stat().st_mtime_ns for path in config.out.rglob("*") if path.is_file()} == before


@pytest.mark.parametrize("damage", ["deleted", "altered", "cut", "same size"])
def test_latents_damaged_behind_our_back_are_made_again(make_job: Any, damage: str) -> None:
    config = make_job(collection(), shard_size=5, commit_size=3)
    cache_latents(config)
    before = snapshot(config.out)
    victim = config.out / "latents" / "deep" / "003.npz"
    if damage == "deleted":
        victim.unlink()
    else:
        whole = victim.read_bytes()
        altered = whole[:400] + bytes([whole[400] ^ 1]) + whole[401:]
        victim.write_bytes({"cut": whole[:-8], "altered": b"\0" * 500, "same size": altered}[damage])
    cache_latents(config)
    assert snapshot(config.out) == before


def test_a_copied_cache_is_believed_by_its_checksums_and_not_made_again(
    make_job: Any, tmp_path: Path, monkeypatch: Any
) -> None:
    config = make_job(collection(), shard_size=5)
    cache_latents(config)
    copied = config.model_copy(update={"out": tmp_path / "copied"})
    for path in sorted(config.out.rglob("*")):
        if path.is_file():
            target = copied.out / path.relative_to(config.out)
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes(path.read_bytes())
    for path in copied.out.rglob("*.npz"):
        os.utime(path, ns=(0, 10**18))

    def no_encoding(*_: Any, **__: Any) -> None:
        raise AssertionError("encoded again")

    monkeypatch.setattr(Device, "submit", no_encoding)
    assert cache_latents(copied).num_kept == 12
    before = {path: path.stat().st_mtime_ns for path in copied.out.rglob("*") if path.is_file()}
    cache_latents(copied)
    assert {path: path.stat().st_mtime_ns for path in copied.out.rglob("*") if path.is_file()} == before


@pytest.mark.parametrize("batch_size", [1, 4])
def test_shards_commits_and_threads_do_not_change_the_result(make_job: Any, batch_size: int, tmp_path: Path) -> None:
    config = make_job(collection(), batch_size=batch_size)
    cache_latents(config)
    commit_size = 2 if batch_size == 1 else config.commit_size  # batches end with their commit group
    other = config.model_copy(update={"out": tmp_path / "other", "decode_threads": 5, "commit_size": commit_size})
    cache_latents(other)
    assert snapshot(other.out) == snapshot(config.out)


def test_slots_make_what_one_process_makes(make_job: Any, tmp_path: Path) -> None:
    config = make_job(collection(), shard_size=4)
    cache_latents(config)
    slots = config.model_copy(update={"out": tmp_path / "slots", "devices": "cpu,cpu"})
    cache_latents(slots)
    assert snapshot(slots.out) == snapshot(config.out)


@pytest.mark.parametrize(
    ("field", "value"),
    [("resolution_px", 96), ("dtype", "bfloat16"), ("compat", "sd-scripts"), ("seed", 1), ("background", "#000000")],
)
def test_the_folder_of_other_settings_is_refused_by_name(make_job: Any, field: str, value: Any) -> None:
    config = make_job(collection(3))
    cache_latents(config)
    with pytest.raises(ConfigError, match=rf"was made with {field} = .*{value}"):
        cache_latents(CacheLatentsConfig(**config.model_dump() | {field: value}))


def test_another_vae_is_refused(make_job: Any, tmp_path: Path) -> None:
    config = make_job(collection(3))
    cache_latents(config)
    vae = load_vae("tiny", dtype=torch.float32)
    with torch.no_grad():
        next(vae.parameters()).add_(1)
    vae.save_pretrained(tmp_path / "vae")
    with pytest.raises(ConfigError, match="made with other weights than vae ="):
        cache_latents(config.model_copy(update={"vae": str(tmp_path / "vae")}))


def test_two_jobs_never_write_into_one_folder(make_job: Any) -> None:
    config = make_job(collection(3))
    code = (
        "import sys\nfrom pathlib import Path\nfrom sdxl_core.lock import output_lock\n"
        "with output_lock(Path(sys.argv[1]), purpose='first job'):\n    print(flush=True); sys.stdin.read()\n"
    )
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[2])}
    with subprocess.Popen(
        [sys.executable, "-c", code, str(config.out / "latents")],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environment,
    ) as other:  # fmt: skip
        assert other.stdout is not None and other.stdout.readline()
        with pytest.raises(LockedError, match="first job"):
            cache_latents(config)
        other.communicate()
    assert cache_latents(config).num_kept == 3


def test_keys_reach_their_pictures_as_paths_stems_and_from_other_machines(make_job: Any) -> None:
    config = make_job(collection(4))
    metadata = {
        "H:\\just\\000.png": {"tags": "windows"},
        f"{config.source}/001.jpg": {"tags": "full path"},
        "002": {"tags": "stem"},
        "../in/002.webp": {"tags": "outside"},
        "/etc/passwd": {"tags": "absolute"},
        "deep/003": {"tags": "nested"},
        "deep/003.png": {"tags": "again"},
    }
    config.metadata.write_text(json.dumps(metadata))
    ref = cache_latents(config.model_copy(update={"root_map": {"H:/just": str(config.source)}}))
    reasons = {row.key: row.reason for row in read_rejected(ref.rejected)}
    assert reasons == {
        "../in/002.webp": "missing_image",
        "/etc/passwd": "missing_image",
        "deep/003.png": "duplicate_key",
    }
    written = sorted(str(path.relative_to(config.out / "latents")) for path in (config.out / "latents").rglob("*.npz"))
    assert written == ["000.npz", "001.npz", "002.npz", "deep/003.npz"]
    store = LatentStore(config.out / "latents")
    assert all(store.has(key) for key in ("H:\\just\\000.png", "002", "deep/003"))


def test_a_folder_of_which_nothing_can_be_used_is_told(make_job: Any) -> None:
    with pytest.raises(DataError, match="none of its 2 pictures could be encoded \\(1 empty_file, 1 undecodable\\)"):
        cache_latents(make_job({"a.png": b"", "b.png": b"x"}))


def with_vae(monkeypatch: Any, change: Callable[[torch.Tensor, torch.Tensor, str], torch.Tensor]) -> None:
    """Let the engine work with a VAE whose means are changed: change(images, mean, dtype)."""

    def load(vae: str, dtype: str, device: torch.device) -> EncodeFunction:
        encode = load_encoder(vae, "float32", device)

        def changed(images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            mean, logvar = encode(images)
            return change(images, mean.clone(), dtype), logvar

        return changed

    monkeypatch.setattr("sdxl_core.latents.encode.Engine", partial(Engine, load=load))


def test_half_precision_overflow_is_encoded_in_float32_and_nan_is_rejected(make_job: Any, monkeypatch: Any) -> None:
    config = make_job({"a.png": encoded(picture(64, 64), "PNG"), "b.png": encoded(picture(64, 64, seed=1), "PNG")})

    def overflow(images: torch.Tensor, mean: torch.Tensor, dtype: str) -> torch.Tensor:
        mean[0, 0, 0, 0] = torch.inf if dtype == "float16" else mean[0, 0, 0, 0]
        return mean

    with_vae(monkeypatch, overflow)
    half = config.model_copy(update={"dtype": "float16", "out": config.out / "half"})
    assert cache_latents(half).num_kept == 2

    def never_finite(images: torch.Tensor, mean: torch.Tensor, dtype: str) -> torch.Tensor:
        mean[0] = torch.nan
        return mean

    with_vae(monkeypatch, never_finite)
    ref = cache_latents(config)
    assert [(row.key, row.reason) for row in read_rejected(ref.rejected)] == [("a", "nan_latent")]


def test_each_shard_says_how_it_was_encoded(make_job: Any, monkeypatch: Any) -> None:
    config = make_job(collection(8), shard_size=4, batch_size=2)

    def small_card(images: torch.Tensor, mean: torch.Tensor, dtype: str) -> torch.Tensor:
        if len(images) > 1:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return mean

    with_vae(monkeypatch, small_card)
    for shard in plan_latents(config).shards:
        ref = encode_shard(shard, config, "cpu", "")
        assert ref.images_per_s > 0 and set(ref.seconds) == set(STAGES) and ref.bound_by in STAGES
        assert set(ShardLedger.read(shard.path, 4).notes) == {"halved"}


def test_packed_files_are_of_one_bucket_and_commit_group(make_job: Any) -> None:
    config = make_job(collection(12), shard_size=9, commit_size=4, batch_size=2, layout="packed")
    cache_latents(config)
    keys = list(json.loads(config.metadata.read_text()))
    places = []
    for path in (config.out / "latents" / "packed").glob("*/*.npz"):
        packed = PackedFile(path)
        assert packed.dtype == np.float16 and path.parent.name == "{}x{}".format(*packed.bucket)
        (group,) = {(keys.index(key) // 9, keys.index(key) % 9 // 4) for key in packed.keys}
        places.append((packed.bucket, group))
        with zipfile.ZipFile(path) as archive:
            assert {member.compress_type for member in archive.infolist()} == {zipfile.ZIP_STORED}
    assert len(places) == len(set(places)) > 4


@pytest.mark.parametrize("layout", ["per_image", "packed"])
def test_a_group_is_recorded_when_its_files_are_on_the_disk(make_job: Any, monkeypatch: Any, layout: str) -> None:
    synced: set[str] = set()
    recorded: list[str] = []
    sync_files, commit = encode.sync_files, ShardLedger.commit

    def syncing(paths: Any) -> None:
        paths = list(paths)
        sync_files(paths)
        synced.update(str(path) for path in paths)

    def committing(ledger: ShardLedger, group: CommitGroup) -> None:
        for file in group.files:
            recorded.append(str(config.out / "latents" / file.path))
            assert recorded[-1] in synced
        commit(ledger, group)

    monkeypatch.setattr(encode, "sync_files", syncing)
    monkeypatch.setattr(ShardLedger, "commit", committing)
    config = make_job(collection(7), commit_size=3, batch_size=2, layout=layout)
    cache_latents(config)
    assert sorted(recorded) == sorted(map(str, (config.out / "latents").rglob("*.npz")))


def test_latents_of_another_version_of_the_format_are_refused(make_job: Any) -> None:
    config = make_job(collection(2))
    cache_latents(config)
    path = config.out / "latents" / ".ledger" / "settings.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"format": 1}))
    with pytest.raises(ConfigError, match="was made with format = 1, not 2"):
        cache_latents(config)


def test_running_out_of_memory_halves_the_batch_and_loses_nothing(make_job: Any, monkeypatch: Any) -> None:
    config = make_job(collection(8), batch_size=8)

    def small_card(images: torch.Tensor, mean: torch.Tensor, dtype: str) -> torch.Tensor:
        if len(images) > 1:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return mean

    with_vae(monkeypatch, small_card)
    assert cache_latents(config).num_kept == 8


def test_training_never_sees_latents_that_were_not_committed(make_job: Any) -> None:
    config = make_job(collection(3))
    cache_latents(config)
    store = LatentStore(config.out / "latents")
    other = read_per_image(config.out / "latents" / "001.npz")
    np.savez(
        config.out / "latents" / "000.npz",
        latents=other.latents + 1, original_size=np.array([1, 1]), crop_ltrb=np.zeros(4),
    )  # fmt: skip
    with pytest.raises(ShardError, match="other bytes than were committed"):
        store.read("000")


def test_the_plan_refuses_what_is_not_there(make_job: Any, tmp_path: Path) -> None:
    config = make_job(collection(1))
    for field, value, words in [
        ("source", tmp_path / "nowhere", "no such folder"),
        ("metadata", tmp_path / "no.json", "no such metadata"),
        ("vae", str(tmp_path / "no.safetensors"), "no such file"),
    ]:
        with pytest.raises(ConfigError, match=words):
            plan_latents(config.model_copy(update={field: value}))


def test_the_lock_is_shared_with_a_flow_of_the_same_process(make_job: Any) -> None:
    config = make_job(collection(2))
    with output_lock(config.out / "latents", purpose="flow"):
        assert cache_latents(config).num_kept == 2


@pytest.mark.parametrize("damage", [b"\0" * 40, b"[1]", b'{"group":1}', b'{"done":3}', b"null"])
@pytest.mark.parametrize("place", [0, 2])
def test_a_damaged_line_of_a_ledger_costs_its_group_only(make_job: Any, damage: bytes, place: int) -> None:
    config = make_job(collection(), shard_size=12, commit_size=2, batch_size=2)
    first = cache_latents(config)
    before = snapshot(config.out)
    (ledger,) = (config.out / "latents" / ".ledger").glob("*.ledger.jsonl")
    lines = ledger.read_bytes().split(b"\n")
    lines[place] = damage
    ledger.write_bytes(b"\n".join(lines))
    again = cache_latents(config)
    assert (again.num_kept, again.num_rejected) == (first.num_kept, first.num_rejected)
    assert snapshot(config.out) == before
    assert damage not in ledger.read_bytes().split(b"\n")


@pytest.mark.parametrize("content", [b"{bad", b"", b"[1]", b"null"])
def test_damaged_settings_are_told(make_job: Any, content: bytes) -> None:
    config = make_job(collection(3))
    cache_latents(config)
    (config.out / "latents" / ".ledger" / "settings.json").write_bytes(content)
    with pytest.raises(DataError, match=r"settings\.json: damaged.*delete"):
        cache_latents(config)


@pytest.mark.parametrize("is_finished", [True, False])
def test_a_damaged_listing_of_a_shard_is_made_again(make_job: Any, is_finished: bool) -> None:
    config = make_job(collection(4))
    cache_latents(config)
    before = snapshot(config.out)
    folder = config.out / "latents" / ".ledger"
    if not is_finished:
        for path in folder.glob("*.ledger.jsonl"):
            path.unlink()
    (listing,) = folder.glob("*.rows.arrow")
    whole = listing.read_bytes()
    listing.write_bytes(b"x" * len(whole))
    cache_latents(config)
    assert snapshot(config.out) == before
    listing.write_bytes(whole[:300] + bytes([whole[300] ^ 1]) + whole[301:])
    for path in folder.glob("*.ledger.jsonl"):
        path.unlink()
    with pytest.raises(ShardError, match="gone or damaged"):
        cache_latents(config)
    cache_latents(config)
    assert snapshot(config.out) == before
