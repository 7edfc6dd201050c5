"""The engine alone: what goes in comes out, once, in order, with the same bits whatever the threads do."""

import hashlib
import io
import tarfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from support.pictures import encoded, picture

from sdxl_core.catalog.images import ImagePlace
from sdxl_core.config import CacheLatentsConfig
from sdxl_core.errors import DataError, DiskFullError
from sdxl_core.latents.engine import EncodedGroup, Engine, EngineReport, Picture
from sdxl_core.latents.engine import prepare as preparing
from sdxl_core.latents.engine.batches import batches_of
from sdxl_core.latents.engine.read import Reader
from sdxl_core.latents.vae import EncodeFunction, LoadFunction, load_encoder, posterior_noise

SMALL = {
    "vae": "tiny", "resolution_px": 64, "min_bucket_px": 32, "max_bucket_px": 128, "bucket_step_px": 32,
    "devices": "cpu",
}  # fmt: skip
SIZES = [(64, 64), (90, 60), (60, 90), (128, 40), (50, 70)]
Groups = list[tuple[int, list[Picture]]]


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Torch's threads would spin for work of microseconds."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def config_of(tmp_path: Path, **options: Any) -> CacheLatentsConfig:
    return CacheLatentsConfig(source=tmp_path, metadata=tmp_path, out=tmp_path / "out", **SMALL | options)


def place(path: Path) -> ImagePlace:
    return ImagePlace(path=path, name=path.name, offset=0, num_bytes=path.stat().st_size, in_tar=False)


def pictures_in(tmp_path: Path, num: int = 12, *, mode: str = "RGB") -> list[Picture]:
    made = []
    for number in range(num):
        path = tmp_path / f"{number:03}.png"
        path.write_bytes(encoded(picture(*SIZES[number % len(SIZES)], seed=number, mode=mode), "PNG"))
        made.append(Picture(path.stem, place(path)))
    return made


def grouped(pictures: Sequence[Picture], size: int) -> Groups:
    return [(n, list(pictures[start : start + size])) for n, start in enumerate(range(0, len(pictures), size))]


def run(config: CacheLatentsConfig, groups: Groups, load: LoadFunction | None = None) -> list[EncodedGroup]:
    done: list[EncodedGroup] = []
    Engine(config, "cpu", load=load or pooling).run(groups, done.append)
    return done


def images_of(pixels: torch.Tensor) -> torch.Tensor:
    """uint8 [B, h, w, 3] to [B, 3, h, w] in -1 ... 1."""
    return pixels.permute(0, 3, 1, 2).float() / 127.5 - 1


def pooling(vae: str, dtype: str, device: torch.device) -> EncodeFunction:
    """Means of 8 x 8 pixels for a VAE, with a posterior of width 1; the batch leaves its mark on each picture."""

    def encode(pixels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        images = images_of(pixels)
        small = torch.nn.functional.avg_pool2d(images, 8)
        mean = torch.cat([small, small.mean(dim=1, keepdim=True)], dim=1) + len(images) * images.mean()
        return mean, torch.zeros_like(mean)

    return encode


def changed(change: Callable[[torch.Tensor, torch.Tensor, str], torch.Tensor]) -> LoadFunction:
    """`pooling` with its means changed: change(images, mean, dtype)."""

    def load(vae: str, dtype: str, device: torch.device) -> EncodeFunction:
        encode = pooling(vae, dtype, device)

        def other(pixels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            mean, logvar = encode(pixels)
            return change(images_of(pixels), mean, dtype), logvar

        return other

    return load


def contents(groups: Sequence[EncodedGroup]) -> dict[str, tuple[bytes, ...]]:
    return {
        item.picture.key: tuple(array.tobytes() for _, array in item.record.arrays())
        for group in groups
        for item in group.pictures
    }


class Sized:
    def __init__(self, choice: Any, name: int) -> None:
        self.choice, self.name = choice, name


def test_batches_close_when_full_and_at_the_end_in_order_of_buckets() -> None:
    from sdxl_core.buckets import Bucket, BucketChoice

    def item(name: int, width_px: int) -> Sized:
        bucket = Bucket(width_px, 64)
        return Sized(BucketChoice(bucket=bucket, resized_width_px=1, resized_height_px=1, ar_error=0), name)

    items = [item(0, 96), item(1, 64), item(2, 96), item(3, 64), item(4, 64), item(5, 96), item(6, 32)]
    batches = [[entry.name for entry in batch] for batch in batches_of(items, 2)]
    assert batches == [[0, 2], [1, 3], [6], [4], [5]]


def test_every_picture_comes_out_once_in_order_with_its_sizes_and_digest(tmp_path: Path) -> None:
    pictures = pictures_in(tmp_path)
    (tmp_path / "bad.png").write_bytes(b"no picture")
    pictures.insert(3, Picture("bad", place(tmp_path / "bad.png")))
    gone = ImagePlace(path=tmp_path / "gone.png", name="gone.png", offset=0, num_bytes=1, in_tar=False)
    pictures.insert(9, Picture("gone", gone))
    groups = run(config_of(tmp_path), grouped(pictures, 5))
    assert [group.number for group in groups] == [0, 1, 2]
    reasons = [(key, reason) for group in groups for key, reason, _ in group.rejected]
    assert reasons == [("bad", "undecodable"), ("gone", "missing_image")]
    kept = [item for group in groups for item in group.pictures]
    assert [item.picture.key for item in kept] == [p.key for p in pictures if p.key not in ("bad", "gone")]
    for item in kept:
        data = item.picture.place.path.read_bytes()
        with Image.open(io.BytesIO(data)) as image:
            assert (item.record.original_width_px, item.record.original_height_px) == image.size
        assert item.record.image_sha256 == hashlib.sha256(data).digest()
        assert item.record.bucket == (item.bucket.width_px, item.bucket.height_px)
        assert item.record.latents.base is None or item.record.latents.base.nbytes == item.record.latents.nbytes


def test_threads_do_not_change_a_bit_and_neither_does_an_interruption(tmp_path: Path, monkeypatch: Any) -> None:
    groups = grouped(pictures_in(tmp_path, 24), 7)
    calm = contents(run(config_of(tmp_path, batch_size=3, decode_threads=1), groups))
    decode = preparing.decode_pixels

    def uneven(data: bytes, *args: Any, **options: Any) -> Any:
        time.sleep(data[-20] / 50_000)
        return decode(data, *args, **options)

    monkeypatch.setattr(preparing, "decode_pixels", uneven)
    config = config_of(tmp_path, batch_size=3, decode_threads=7)
    assert contents(run(config, groups)) == calm
    kept: list[EncodedGroup] = []

    def stop_after_two(group: EncodedGroup) -> None:
        if len(kept) == 2:
            raise DiskFullError("no room")
        kept.append(group)

    with pytest.raises(DiskFullError):
        Engine(config, "cpu", load=pooling).run(groups, stop_after_two)
    assert [group.number for group in kept] == [0, 1]
    assert contents(kept) | contents(run(config, groups[2:])) == calm


def test_a_tar_is_read_in_place(tmp_path: Path) -> None:
    pictures = pictures_in(tmp_path, 6)
    with tarfile.open(tmp_path / "all.tar", "w") as tar:
        for item in pictures:
            tar.add(item.place.path, item.place.name)
    with tarfile.open(tmp_path / "all.tar") as tar:
        in_tar = [
            Picture(m.name[:-4], ImagePlace(tmp_path / "all.tar", m.name, m.offset_data, m.size, True)) for m in tar
        ]
    config = config_of(tmp_path)
    assert contents(run(config, grouped(in_tar, 6))) == contents(run(config, grouped(pictures, 6)))
    beyond = in_tar[-1].place._replace(num_bytes=10**7)
    (group,) = run(config, [(0, [*in_tar[:2], Picture("cut", beyond)])])
    assert len(group.pictures) == 2 and group.rejected[0][:2] == ("cut", "unreadable")


@pytest.mark.parametrize("fits", [1, 2, 3])
def test_what_does_not_fit_into_memory_is_halved_and_nothing_is_lost(tmp_path: Path, fits: int) -> None:
    pictures = pictures_in(tmp_path, 13)
    sizes: list[int] = []

    def small_card(images: torch.Tensor, mean: torch.Tensor, dtype: str) -> torch.Tensor:
        if len(images) > fits:
            raise torch.OutOfMemoryError("CUDA out of memory")
        sizes.append(len(images))
        return mean - len(images) * images.mean()

    (group,) = run(config_of(tmp_path, batch_size=8), [(0, pictures)], changed(small_card))
    assert [item.picture.key for item in group.pictures] == [item.key for item in pictures]
    assert max(sizes) <= fits and set(group.notes) == {"halved"}
    whole = changed(lambda images, mean, dtype: mean - len(images) * images.mean())
    for one, other in zip(run(config_of(tmp_path), [(0, pictures)], whole)[0].pictures, group.pictures, strict=True):
        np.testing.assert_allclose(one.record.latents, other.record.latents, atol=1e-5)


def test_a_single_picture_that_does_not_fit_is_an_error(tmp_path: Path) -> None:
    def no_card(images: torch.Tensor, mean: torch.Tensor, dtype: str) -> torch.Tensor:
        raise torch.OutOfMemoryError("CUDA out of memory")

    with pytest.raises(torch.OutOfMemoryError):
        run(config_of(tmp_path), [(0, pictures_in(tmp_path, 3))], changed(no_card))


def test_overflow_is_encoded_again_in_float32_and_what_stays_bad_is_rejected(tmp_path: Path) -> None:
    pictures = pictures_in(tmp_path, 6)
    white = tmp_path / "white.png"
    white.write_bytes(encoded(Image.new("RGB", (64, 64), "white"), "PNG"))
    pictures.insert(2, Picture("white", place(white)))

    def half(images: torch.Tensor, mean: torch.Tensor, dtype: str) -> torch.Tensor:
        if dtype == "float16":
            mean[0, 0, 0, 0] = torch.inf
        return torch.where((images.amin(dim=(1, 2, 3)) > 0.9)[:, None, None, None], torch.nan, mean)

    (group,) = run(config_of(tmp_path, dtype="float16"), [(0, pictures)], changed(half))
    assert group.notes and set(group.notes) == {"float32"}
    assert [(key, reason) for key, reason, _ in group.rejected] == [("white", "nan_latent")]
    (whole,) = run(config_of(tmp_path), [(0, pictures)], changed(half))
    assert contents([whole]) == contents([group]) and len(group.pictures) == 6


def test_mirrored_latents_are_those_of_the_mirrored_picture_with_noise_of_their_own(tmp_path: Path) -> None:
    pictures = pictures_in(tmp_path, 5)
    (group,) = run(config_of(tmp_path, flip_aug=True, batch_size=1), [(0, pictures)], load_encoder)
    (plain,) = run(config_of(tmp_path, batch_size=1), [(0, pictures)], load_encoder)
    encode = load_encoder("tiny", "float32", torch.device("cpu"))
    for item, alone in zip(group.pictures, plain.pictures, strict=True):
        assert np.array_equal(item.record.latents, alone.record.latents)
        image = np.asarray(Image.open(item.picture.place.path))
        if image.shape[:2] != (64, 64):
            continue
        mirrored = torch.from_numpy(image[:, ::-1].copy())[None]
        with torch.inference_mode():
            mean, logvar = encode(mirrored)
        noise = posterior_noise(item.record.image_sha256 + b"/flipped", 0, 8, 8)
        assert item.record.latents_flipped is not None
        expected = (mean + torch.exp(logvar / 2) * noise)[0]
        torch.testing.assert_close(torch.from_numpy(item.record.latents_flipped), expected, rtol=1e-4, atol=1e-4)


def test_masks_are_kept_where_asked_for(tmp_path: Path) -> None:
    (group,) = run(config_of(tmp_path, alpha_mask=True), [(0, pictures_in(tmp_path, 5, mode="RGBA"))])
    for item in group.pictures:
        mask = item.record.alpha_mask
        assert mask is not None and mask.shape == (item.bucket.height_px, item.bucket.width_px) and mask.min() < 255
    (tmp_path / "plain").mkdir()
    (group,) = run(config_of(tmp_path, alpha_mask=True), [(0, pictures_in(tmp_path / "plain", 5))])
    assert all(item.record.alpha_mask is not None and item.record.alpha_mask.min() == 255 for item in group.pictures)


def test_the_posterior_is_kept_where_asked_for(tmp_path: Path) -> None:
    pictures = pictures_in(tmp_path, 5)
    (kept,) = run(config_of(tmp_path, logvar=True, batch_size=1), [(0, pictures)], load_encoder)
    (sampled,) = run(config_of(tmp_path, batch_size=1), [(0, pictures)], load_encoder)
    for one, other in zip(kept.pictures, sampled.pictures, strict=True):
        assert one.record.logvar is not None and other.record.logvar is None
        noise = posterior_noise(one.record.image_sha256, 0, *one.record.latents.shape[1:]).numpy()
        sample = one.record.latents + np.exp(one.record.logvar / 2) * noise
        np.testing.assert_allclose(sample, other.record.latents, rtol=1e-5, atol=1e-5)
    with pytest.raises(ValueError, match="exclude each other"):
        config_of(tmp_path, logvar=True, flip_aug=True)


def bound_by(tmp_path: Path, slow: str, monkeypatch: Any) -> EngineReport:
    """A run whose stage `slow` takes 0.1 s a picture."""

    def slowed(stage: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **options: Any) -> Any:
            time.sleep(0.1 if stage == slow else 0)
            return function(*args, **options)

        return call

    monkeypatch.setattr(Reader, "read", slowed("read", Reader.read))
    monkeypatch.setattr(preparing, "decode_pixels", slowed("decode", preparing.decode_pixels))

    def vae(images: torch.Tensor, mean: torch.Tensor, dtype: str) -> torch.Tensor:
        time.sleep(0.1 * len(images) if slow == "vae" else 0)
        return mean

    def commit(group: EncodedGroup) -> None:
        time.sleep(0.1 * len(group.pictures) if slow == "write" else 0)

    config = config_of(tmp_path, decode_threads=1)
    return Engine(config, "cpu", load=changed(vae)).run(grouped(pictures_in(tmp_path, 24), 4), commit)


@pytest.mark.parametrize("slow", ["read", "decode", "vae", "write"])
def test_the_report_names_the_slowest_stage(tmp_path: Path, slow: str, monkeypatch: Any) -> None:
    report = bound_by(tmp_path, slow, monkeypatch)
    assert report.bound_by == slow and report.busy[slow] > 0.6
    assert report.num_encoded == 24 and report.images_per_s > 0


def test_stages_overlap(tmp_path: Path, monkeypatch: Any) -> None:
    """Decoding, the VAE and writing take 50 ms a picture each, and the run hardly longer than one of them."""
    decode = preparing.decode_pixels

    def slow_decode(*args: Any, **options: Any) -> Any:
        time.sleep(0.05)
        return decode(*args, **options)

    def slow_vae(images: torch.Tensor, mean: torch.Tensor, dtype: str) -> torch.Tensor:
        time.sleep(0.05 * len(images))
        return mean

    monkeypatch.setattr(preparing, "decode_pixels", slow_decode)
    pictures = pictures_in(tmp_path, 48)
    report = Engine(config_of(tmp_path, decode_threads=1), "cpu", load=changed(slow_vae)).run(
        [(0, pictures)], lambda group: None, lambda number, batch: time.sleep(0.05 * len(batch))
    )
    assert report.wall_s < 0.7 * sum(report.seconds[stage] for stage in ("decode", "vae", "write"))


def test_errors_of_every_thread_reach_the_caller_and_leave_no_thread(tmp_path: Path, monkeypatch: Any) -> None:
    before = threading.active_count()
    pictures = pictures_in(tmp_path, 8)

    def groups() -> Iterator[tuple[int, list[Picture]]]:
        yield 0, pictures[:4]
        raise DataError("the listing is gone")

    committed: list[EncodedGroup] = []
    with pytest.raises(DataError, match="listing"):
        Engine(config_of(tmp_path), "cpu", load=pooling).run(groups(), committed.append)
    assert [group.number for group in committed] in ([], [0])  # what was under way may be left

    def broken(images: torch.Tensor, mean: torch.Tensor, dtype: str) -> torch.Tensor:
        raise RuntimeError("the card is gone")

    with pytest.raises(RuntimeError, match="card"):
        run(config_of(tmp_path), grouped(pictures, 2), changed(broken))

    def no_decoder(*args: Any, **options: Any) -> Any:
        raise ZeroDivisionError("a bug of ours")

    monkeypatch.setattr(preparing, "decode_pixels", no_decoder)
    with pytest.raises(ZeroDivisionError):
        run(config_of(tmp_path), grouped(pictures, 2))
    assert threading.active_count() <= before


def test_groups_of_which_nothing_is_left_are_committed_in_their_turn(tmp_path: Path) -> None:
    pictures = pictures_in(tmp_path, 4)
    (tmp_path / "bad.png").write_bytes(b"")
    bad = Picture("bad", place(tmp_path / "bad.png"))
    groups = run(config_of(tmp_path), [(0, pictures[:2]), (1, [bad]), (2, []), (3, pictures[2:])])
    assert [(group.number, len(group.pictures), len(group.rejected)) for group in groups] == [
        (0, 2, 0), (1, 0, 1), (2, 0, 0), (3, 2, 0),
    ]  # fmt: skip


def test_an_open_batch_size_is_settled_once(tmp_path: Path) -> None:
    config = config_of(tmp_path, batch_size=0)
    pictures = pictures_in(tmp_path, 10)
    kept = config.out / "latents" / ".ledger" / "batch_size"
    first = contents(run(config, [(0, pictures)]))
    assert kept.read_bytes() == b"4" and list(kept.parent.iterdir()) == [kept]
    assert contents(run(config_of(tmp_path, batch_size=4), [(0, pictures)])) == first
    kept.write_bytes(b"2")
    assert contents(run(config, [(0, pictures)])) == contents(run(config_of(tmp_path, batch_size=2), [(0, pictures)]))
    kept.write_bytes(b"many")
    with pytest.raises(DataError, match="no batch size"):
        run(config, [(0, pictures)])
