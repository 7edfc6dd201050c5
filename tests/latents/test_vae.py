"""The VAE's encoder as the engine uses it: precisions, memory format, compiled shapes, how many pictures fit."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from support.latent_sets import collection, contents

from sdxl_core.config import CacheLatentsConfig
from sdxl_core.latents import vae
from sdxl_core.latents.cache import cache_latents
from sdxl_core.latents.engine import batch_size, device
from sdxl_core.latents.vae import EncodeFunction, load_encoder
from sdxl_core.models.load import load_vae

CPU = torch.device("cpu")


@pytest.mark.parametrize(("dtype", "most"), [("float16", 0.02), ("bfloat16", 0.15)])
def test_latents_in_half_precision_are_near_those_in_float32(make_job: Any, dtype: str, most: float) -> None:
    config = make_job(collection(5), layout="packed", packed_dtype="float32")
    cache_latents(config)
    half = config.model_copy(update={"dtype": dtype, "out": config.out.parent / dtype})
    cache_latents(half)
    whole, found = contents(config.out), contents(half.out)
    assert whole.keys() == found.keys()
    for key in whole:
        one, other = (np.frombuffer(told[key][0][0][2], np.float32) for told in (whole, found))
        assert not np.array_equal(one, other) and np.abs(one - other).max() < most * max(1, np.abs(one).max())


def test_pictures_reach_the_vae_channels_last_from_minus_one_to_one(monkeypatch: pytest.MonkeyPatch) -> None:
    module = load_vae("tiny", dtype=torch.float32)
    seen: list[torch.Tensor] = []
    encode = module.encode
    monkeypatch.setattr(module, "encode", lambda images: (seen.append(images), encode(images))[1])
    monkeypatch.setattr(vae, "load_vae", lambda name, dtype: module)
    pixels = torch.zeros((2, 16, 16, 3), dtype=torch.uint8)
    pixels[1] = 255
    load_encoder.__wrapped__("tiny", "float32", CPU)(pixels)
    (images,) = seen
    assert images.shape == (2, 3, 16, 16) and images.is_contiguous(memory_format=torch.channels_last)
    assert (images.min(), images.max()) == (-1, 1)
    assert next(module.parameters()).is_contiguous(memory_format=torch.channels_last)


def test_full_batches_of_each_shape_go_to_the_compiled_encoder(make_job: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    shapes: list[tuple[int, ...]] = []

    def compiled(encode: EncodeFunction) -> EncodeFunction:
        return lambda pixels: (shapes.append(tuple(pixels.shape)), encode(pixels))[1]

    monkeypatch.setattr(device, "compiled", compiled)
    config = make_job(collection(12), batch_size=2, compile=True)
    assert cache_latents(config).num_kept == 12
    assert {shape[0] for shape in shapes} == {2} and len({shape[1:] for shape in shapes}) >= 3


def test_the_encoder_is_compiled_for_shapes_that_stay(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[dict[str, Any]] = []
    monkeypatch.setattr(torch, "compile", lambda encode, **options: asked.append(options) or encode)

    def encode(pixels: torch.Tensor) -> Any:
        return pixels, pixels

    assert vae.compiled(encode) is vae.compiled(encode) is encode
    assert asked == [{"dynamic": False}], "once a process"


@pytest.mark.parametrize(
    ("seconds", "fits", "expected"),
    [({1: 1, 2: 1.2, 4: 2.0, 8: 4.0}, 64, 4), (dict.fromkeys((1, 2, 4, 8, 16), 1), 16, 16), ({1: 1, 2: 2}, 64, 1)],
)
def test_a_batch_grows_while_it_fits_and_gains(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, seconds: dict[int, float], fits: int, expected: int
) -> None:
    """On a card, which is played here: seconds a batch, and how many pictures fit."""

    def tried(encode: Any, size: int, config: Any, device: Any) -> float:
        if size > fits:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return seconds[size]

    monkeypatch.setattr(batch_size, "_seconds", tried)
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)
    config = CacheLatentsConfig(source=tmp_path, metadata=tmp_path, out=tmp_path, vae="tiny", batch_size=0)
    card = torch.device("cuda:0")
    assert batch_size.settled_batch_size(config, card, lambda *_: None) == expected  # type: ignore[arg-type,return-value]
    monkeypatch.setattr(batch_size, "_seconds", None)
    assert batch_size.settled_batch_size(config, card, lambda *_: None) == expected  # type: ignore[arg-type,return-value]
