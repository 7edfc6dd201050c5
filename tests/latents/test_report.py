"""The page of a latent set: what is on it, and that it is drawn once."""

import base64
import io
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image, ImageColor
from safetensors.torch import save_file
from support.latent_sets import collection, contents

from sdxl_core.latents.cache import cache_latents
from sdxl_core.latents.report import _sheet, channel_statistics, speed_over_time
from sdxl_core.models.load import load_vae


@pytest.mark.parametrize("layout", ["per_image", "packed"])
def test_the_page_shows_buckets_pictures_channels_speed_and_what_was_rejected(make_job: Any, layout: str) -> None:
    config = make_job(collection(9) | {"bad.png": b"<b>"}, layout=layout, commit_size=2)
    ref = cache_latents(config)
    page = (config.out / "latents.html").read_text()
    for words in (
        "Buckets",
        "data:image/png;base64,",
        "Latents by channel",
        ">SDXL</text>",
        "Speed",
        "Rejected: 1",
        "undecodable",
    ):
        assert words in page, words
    back = "<a href='report.html'>"
    assert back in page
    assert not re.search(r"""(src|href)=["'](?!data:)""", page.replace(back, "")), "the page needs something beside it"
    before = (config.out / "latents.html").stat().st_mtime_ns
    assert cache_latents(config) == ref
    assert (config.out / "latents.html").stat().st_mtime_ns == before


def test_a_trained_vae_shows_what_it_makes_of_the_latents(make_job: Any, tmp_path: Path) -> None:
    tensors = load_vae("tiny", dtype=torch.float32).state_dict()
    save_file({key: value.contiguous() for key, value in tensors.items()}, tmp_path / "vae.safetensors")
    files = dict(list(collection(4).items())[:2])
    pages = []
    for name, vae in (("tiny", "tiny"), ("trained", str(tmp_path / "vae.safetensors"))):
        config = make_job(files, vae=vae, out=tmp_path / name)
        cache_latents(config)
        pages.append((config.out / "latents.html").read_text())
    assert "of their middle" in pages[1] and "random weights" not in pages[1] and "random weights" in pages[0]
    assert "One commit: no speed." in pages[0]
    widths = [Image.open(io.BytesIO(base64.b64decode(page.split("base64,")[1].split("'")[0]))).width for page in pages]
    assert widths[1] > 1.4 * widths[0] and "Bound by" in pages[1]


def test_channels_are_told_as_they_are(make_job: Any) -> None:
    config = make_job(collection(5))
    cache_latents(config)
    arrays = [np.frombuffer(found[0][0][2], np.float32).reshape(4, -1) for found in contents(config.out).values()]
    values = np.concatenate(arrays, axis=1)
    told = channel_statistics(config.out / "latents")
    np.testing.assert_allclose([mean for mean, _ in told], values.mean(axis=1), rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose([deviation for _, deviation in told], values.std(axis=1), rtol=1e-4)


def test_speed_is_pictures_by_time(make_job: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    clock = iter(range(1000, 10**6, 2))
    monkeypatch.setattr("sdxl_core.latents.ledger.time.time", lambda: float(next(clock)))
    config = make_job(collection(12), commit_size=3)
    cache_latents(config)
    points = speed_over_time(config.out / "latents")
    assert sum(rate for _, rate in points) / len(points) == pytest.approx(9 / 6)
    assert speed_over_time(tmp_path) == []


def test_devices_that_commit_at_once_and_a_pause_are_no_gap_in_the_speed(
    make_job: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    times = iter([10.0, 10.0, 11.0, 11.0, 111.0, 112.0])
    monkeypatch.setattr("sdxl_core.latents.ledger.time.time", lambda: next(times))
    config = make_job(collection(12), commit_size=2)
    cache_latents(config)
    assert speed_over_time(config.out / "latents") == [(0.5, 4.0), (51.0, 0.02), (101.5, 2.0)]


def test_the_sheet_has_every_cell_below_its_buckets_name() -> None:
    colours = {(64, 96): ["#ff0000", "#00ff00"], (96, 64): ["#0000ff"], (32, 32): ["#ffff00"] * 9}
    cells = {bucket: [Image.new("RGB", (200, 50), colour) for colour in some] for bucket, some in colours.items()}
    pixels = np.asarray(_sheet(cells))
    seen = {}
    for colour in ("#ffff00", "#ff0000", "#00ff00", "#0000ff"):
        rows, columns = np.nonzero((pixels == np.array(ImageColor.getrgb(colour))).all(axis=2))
        seen[colour] = len(rows), rows.min(), columns.min()
    assert [count for count, _, _ in seen.values()] == [90_000, 10_000, 10_000, 10_000]
    tops = [top for _, top, _ in seen.values()]
    assert tops == sorted(tops) and tops[0] > 0 and tops[1] == tops[2] and seen["#00ff00"][2] == 200
