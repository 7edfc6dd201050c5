"""Kills, torn files, dying decoders, NaN for one picture, a clock that jumps: nothing lost, nothing wrong."""

import hashlib
import multiprocessing
import os
import random
import signal
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from support.latent_sets import collection, committed, contents, snapshot
from support.pictures import encoded, picture

from sdxl_core.config import CacheLatentsConfig
from sdxl_core.latents import cache, encode, quarantine
from sdxl_core.latents.cache import cache_latents
from sdxl_core.latents.engine import Engine, engine
from sdxl_core.latents.plan import plan_latents
from sdxl_core.latents.rows import ShardRows
from sdxl_core.latents.vae import EncodeFunction, load_encoder
from sdxl_core.rejected import read_rejected

FORK = multiprocessing.get_context("fork")


def run_forked(config: CacheLatentsConfig, kill_at: int | float | None = None, *, linger_s: float = 0) -> int:
    """cache_latents in a child of this process. Returns its exit code.

    Args:   kill_at: kill -9 at this file operation (int) or after these seconds (float).
            linger_s: how long the thread that meets it waits before; the others go on.
    """

    def child() -> None:
        torch.set_num_threads(1)  # a forked OpenMP does not work
        if isinstance(kill_at, int):
            seen = [0]

            def audit(event: str, _: Any) -> None:
                if event in ("open", "os.rename", "os.remove", "os.mkdir", "os.truncate"):
                    seen[0] += 1
                    if seen[0] == kill_at:
                        time.sleep(linger_s)
                        os.kill(os.getpid(), signal.SIGKILL)

            sys.addaudithook(audit)
        elif kill_at is not None:
            signal.signal(signal.SIGALRM, lambda *_: os.kill(os.getpid(), signal.SIGKILL))
            signal.setitimer(signal.ITIMER_REAL, kill_at)
        try:
            cache_latents(config)
        except BaseException:
            traceback.print_exc()
            os._exit(1)
        os._exit(0)

    process = FORK.Process(target=child)
    process.start()
    process.join()
    return process.exitcode or 0


@pytest.fixture(autouse=True)
def no_page(monkeypatch: pytest.MonkeyPatch) -> None:
    """The page to look at is half of a run's work here, and is drawn when everything else is done."""
    monkeypatch.setattr(cache, "draw_page", lambda config, ref: config.out)


def pooling(vae: str, dtype: str, device: torch.device) -> EncodeFunction:
    """Means of 8 x 8 pixels, for a VAE: where files are what is looked at."""

    def encode(pixels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        small = torch.nn.functional.avg_pool2d(pixels.permute(0, 3, 1, 2).float(), 8) / 255
        mean = torch.cat([small, small.mean(dim=1, keepdim=True)], dim=1)
        return mean, torch.zeros_like(mean)

    return encode


@pytest.fixture
def quick_disk(tmp_path: Path) -> Iterator[Path]:
    """A folder in memory, where there is one: kills of a process do not ask what was synced."""
    if not Path("/dev/shm").is_dir():
        yield tmp_path
        return
    with tempfile.TemporaryDirectory(dir="/dev/shm") as folder:
        yield Path(folder)


@pytest.mark.parametrize("layout", ["per_image", "packed"])
def test_killed_at_50_random_moments_a_cache_ends_like_an_undisturbed_one(
    make_job: Any, quick_disk: Path, layout: str, monkeypatch: Any
) -> None:
    """At most the group under way is lost to each kill, and at the end every byte is the same."""
    files = collection(12) | {"bad.png": b"x", "cut.jpg": collection()["001.jpg"][:300]}
    config = make_job(files, shard_size=8, commit_size=4, batch_size=2, layout=layout, decode_threads=1)
    load_encoder("tiny", "float32", torch.device("cpu"))  # children find what it imports
    monkeypatch.setattr(encode, "Engine", partial(Engine, load=pooling))
    calm = config.model_copy(update={"out": quick_disk / "calm"})
    assert run_forked(calm) == 0
    rng = random.Random(f"kills {layout}")
    num_kills = num_rounds = 0
    while num_kills < 25:
        num_rounds += 1
        out = quick_disk / f"round{num_rounds}"
        mine = config.model_copy(update={"out": out})
        before = 0
        for _ in range(rng.randint(2, 6)):
            moment = rng.randint(1, 260) if rng.random() < 0.8 else rng.uniform(0.005, 0.25)
            code = run_forked(mine, moment)
            assert code in (0, -signal.SIGKILL)
            now = committed(out) if (out / "latents" / ".ledger").exists() else 0
            assert now >= before, "what was committed is never lost"
            before = now
            num_kills += code != 0
        assert run_forked(mine) == 0
        assert snapshot(out) == snapshot(calm.out)
        assert not [path for path in out.rglob("*") if ".attempt." in path.name or path.suffix == ".partial"]


@pytest.mark.parametrize("layout", ["per_image", "packed"])
def test_files_that_were_never_recorded_are_written_again_whatever_their_length(
    make_job: Any, layout: str, tmp_path: Path
) -> None:
    """A power cut leaves files of any length whose group has no line in the ledger: they are not believed."""
    config = make_job({"a.png": encoded(picture(64, 64), "PNG")}, layout=layout)
    cache_latents(config)
    whole = snapshot(config.out)
    (path,) = (config.out / "latents").rglob("*.npz")
    (ledger,) = (config.out / "latents" / ".ledger").glob("*.ledger.jsonl")
    data = path.read_bytes()
    for length in {*range(0, len(data), len(data) // 9), 1, len(data) - 1, len(data)}:
        ledger.unlink()
        path.write_bytes(data[:length] if length < len(data) else b"\0" * length)
        cache_latents(config)
        assert snapshot(config.out) == whole, length


def test_a_record_without_its_bytes_is_not_believed_whatever_length_they_have(make_job: Any) -> None:
    config = make_job({"a.png": encoded(picture(64, 64), "PNG")})
    cache_latents(config)
    whole = snapshot(config.out)
    (path,) = (config.out / "latents").rglob("*.npz")
    data = path.read_bytes()
    for length in range(0, len(data), len(data) // 9):
        path.write_bytes(data[:length])
        cache_latents(config)
        assert snapshot(config.out) == whole, length


@pytest.mark.parametrize("layout", ["per_image", "packed"])
def test_an_output_that_was_deleted_in_part_is_completed(make_job: Any, layout: str) -> None:
    config = make_job(collection(14), shard_size=9, commit_size=4, batch_size=2, layout=layout)
    cache_latents(config)
    whole, right = snapshot(config.out), contents(config.out)
    rng = random.Random(5)
    for _ in range(6):
        files = [path for path in sorted(config.out.rglob("*")) if path.is_file() and path.name != "settings.json"]
        for path in rng.sample(files, len(files) // 3):
            path.unlink()
        cache_latents(config)
        assert contents(config.out) == right
        assert snapshot(config.out)["meta_lat.json"] == whole["meta_lat.json"]


def test_a_vae_that_gives_nan_for_one_picture_costs_that_picture(make_job: Any, monkeypatch: Any) -> None:
    files = {f"{number}.png": encoded(picture(64, 64, seed=number), "PNG") for number in range(6)}
    files["3.png"] = encoded(picture(64, 64).point(lambda _: 255), "PNG")
    config = make_job(files, batch_size=3, layout="packed")

    def load(vae: str, dtype: str, device: torch.device) -> Any:
        whole = load_encoder(vae, "float32", device)

        def nan_for_white(pixels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            mean, logvar = whole(pixels)
            white = (pixels.flatten(1) == 255).all(dim=1)
            return torch.where(white[:, None, None, None], torch.nan, mean), logvar

        return nan_for_white

    monkeypatch.setattr(encode, "Engine", partial(Engine, load=load))
    ref = cache_latents(config)
    assert [(row.key, row.reason) for row in read_rejected(ref.rejected)] == [("3", "nan_latent")]
    assert sorted(contents(config.out)) == ["0", "1", "2", "4", "5"]
    right = contents(config.out)
    (path,) = (config.out / "latents" / "packed").rglob("*.npz")
    path.unlink()
    cache_latents(config)
    assert contents(config.out) == right, "the picture that is NaN is in its batch again"


def test_values_too_large_for_float16_cost_their_picture(make_job: Any, monkeypatch: Any) -> None:
    config = make_job(collection(3), batch_size=1, layout="packed", decode_threads=1)
    numbers = iter(range(9))

    def load(vae: str, dtype: str, device: torch.device) -> Any:
        whole = load_encoder(vae, dtype, device)
        return lambda images: (whole(images)[0] + (0 if next(numbers) else 1e5), whole(images)[1])

    monkeypatch.setattr(encode, "Engine", partial(Engine, load=load))
    ref = cache_latents(config)
    rejected = [(row.key, row.reason, row.detail) for row in read_rejected(ref.rejected)]
    assert len(rejected) == 1 and ref.num_kept == 2
    assert rejected[0][1:] == ("nan_latent", "the VAE gives values that are too large for float16")


def test_a_picture_that_kills_its_decoder_is_found_and_the_run_goes_on(
    make_job: Any, monkeypatch: Any, tmp_path: Path
) -> None:
    """The process dies (really: SIGKILL) whenever it decodes one of two pictures; each run is one attempt."""
    config = make_job(collection(12), shard_size=12, commit_size=6, batch_size=2, decode_threads=1)
    load_encoder("tiny", "float32", torch.device("cpu"))
    killers = {config.source / "002.webp", config.source / "008.webp"}
    contents_of_killers = {path.read_bytes() for path in killers}
    decode = engine.prepare

    def deadly(one: Any, data: bytes, **options: Any) -> Any:
        if data in contents_of_killers:
            os.kill(os.getpid(), signal.SIGKILL)
        return decode(one, data, **options)

    monkeypatch.setattr(engine, "prepare", deadly)
    tried: list[list[str]] = []

    def decoded_apart(places: Any, config: Any) -> int | None:
        tried.append([place.name for place in places])
        deaths = [number for number, place in enumerate(places) if place.path in killers]
        return deaths[0] if deaths else None

    monkeypatch.setattr(quarantine, "_decode_in_child", decoded_apart)
    codes = [run_forked(config) for _ in range(8)]
    assert codes[:2] == [-signal.SIGKILL] * 2 and codes[-1] == 0
    rejected = [(row.key, row.reason) for row in read_rejected(config.out / "rejected.jsonl")]
    assert rejected == [("002", "kills_decoder"), ("008", "kills_decoder")]
    assert all(row.attempts >= 2 for row in read_rejected(config.out / "rejected.jsonl"))
    assert len(contents(config.out)) == 10


def test_a_decoder_is_tried_in_a_process_of_its_own(make_job: Any, monkeypatch: Any, tmp_path: Path) -> None:
    """Real children: they decode what is harmless and are killed by what is not."""
    files = {"bad.png": b"it is rejected, it kills nothing", "deadly.jpg": collection(2)["001.jpg"]}
    config = make_job(files)
    rows = ShardRows.open(plan_latents(config).shards[0].path)
    (tmp_path / "hook").mkdir()
    (tmp_path / "hook" / "sitecustomize.py").write_text(
        "import os, sys\n"
        "def audit(event, args):\n"
        "    if event == 'open' and str(args[0]).endswith('deadly.jpg'):\n"
        "        os.kill(os.getpid(), 9)\n"
        "sys.addaudithook(audit)\n"
    )
    monkeypatch.setenv("PYTHONPATH", str(tmp_path / "hook"))
    assert quarantine.killers(rows.places(np.arange(2), config.source), config) == [1]


def test_a_clock_that_jumps_changes_nothing(make_job: Any, monkeypatch: Any) -> None:
    config = make_job(collection(9), shard_size=4, commit_size=2, batch_size=2)
    calm = config.model_copy(update={"out": config.out.parent / "calm"})
    cache_latents(calm)
    now = time.time
    jumps = iter(range(10**6))
    monkeypatch.setattr(time, "time", lambda: now() + (-1) ** next(jumps) * 10**6)
    ref = cache_latents(config)
    for path in (config.out / "latents" / ".ledger").glob("*.ledger.jsonl"):
        os.utime(path, (0, 0))  # written before anything else, as the clock says
    assert cache_latents(config).num_kept == ref.num_kept == 9
    assert snapshot(config.out) == snapshot(calm.out)


@pytest.mark.parametrize("layout", ["per_image", "packed"])
def test_a_kill_costs_the_encoding_of_one_group_at_most(
    make_job: Any, quick_disk: Path, layout: str, monkeypatch: Any
) -> None:
    """Every picture that goes to the VAE is logged; whatever was being done when the process was killed goes on a while
    before, so that it may encode as far ahead as it dares to."""
    config = make_job(collection(24), shard_size=24, commit_size=6, batch_size=2, layout=layout, decode_threads=1)
    log = quick_disk / "encoded"

    def load(vae: str, dtype: str, device: torch.device) -> EncodeFunction:
        def logged(pixels: torch.Tensor) -> Any:
            with open(log, "a") as file:
                file.write("".join(hashlib.sha256(image.numpy()).hexdigest() + "\n" for image in pixels))
            return pooling(vae, dtype, device)(pixels)

        return logged

    load_encoder("tiny", "float32", torch.device("cpu"))  # children find what it imports
    monkeypatch.setattr(encode, "Engine", partial(Engine, load=load))
    rng = random.Random(f"one group {layout}")
    most = 0
    for number, moment in enumerate(rng.sample(range(30, 170), 8)):
        mine = config.model_copy(update={"out": quick_disk / str(number)})
        log.write_bytes(b"")
        code = run_forked(mine, moment, linger_s=0.25)
        assert run_forked(mine) == 0
        encodings = Counter(log.read_text().splitlines())
        twice = encodings.total() - len(encodings)
        assert len(encodings) == 24 and twice <= 6, f"killed at file operation {moment}"
        assert code or not twice
        most = max(most, twice)
    assert most >= 4, "no kill was where it costs something"
