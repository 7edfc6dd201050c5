"""Mirrored and resampled latents are functions of (seed, epoch, key)."""

import numpy as np
import pytest
import torch

from sdxl_core.errors import DataError
from sdxl_core.latents import LatentRecord
from sdxl_core.training.latent_view import LatentView, view_of

RNG = np.random.default_rng(0)
LATENTS, FLIPPED, LOGVAR = (RNG.standard_normal((4, 8, 12)).astype(np.float32) for _ in range(3))
MASK = RNG.integers(0, 256, (64, 96)).astype(np.uint8)


def record(**changes: object) -> LatentRecord:
    values = {
        "latents": LATENTS, "original_width_px": 300, "original_height_px": 200, "crop_ltrb": (3.0, 2.5, 90.7, 62.0),
        "latents_flipped": FLIPPED,
    }  # fmt: skip
    return LatentRecord(**values | changes)  # type: ignore[arg-type]


def views(**changes: object) -> list[LatentView]:
    return [view_of(record(**changes), key=f"k{i}", epoch=2, seed=5, flip_aug=True) for i in range(200)]


def test_half_of_the_samples_are_mirrored_with_their_crop_and_mask() -> None:
    seen = views(alpha_mask=MASK)
    mirrored = [view for view in seen if torch.equal(view.latents, torch.from_numpy(FLIPPED))]
    plain = [view for view in seen if torch.equal(view.latents, torch.from_numpy(LATENTS))]
    assert len(mirrored) + len(plain) == 200 and 70 < len(mirrored) < 130
    assert {(v.crop_left_px, v.crop_top_px) for v in plain} == {(3, 2)}
    assert {(v.crop_left_px, v.crop_top_px) for v in mirrored} == {(5, 2)}, "96 - 90.7, cut to whole pixels"
    expected = torch.from_numpy(MASK.astype(np.float32) / 255)
    assert torch.equal(plain[0].alpha_mask, expected)
    assert torch.equal(mirrored[0].alpha_mask, expected.flip(-1))


def test_the_coin_is_tossed_anew_each_epoch_and_repeats_exactly() -> None:
    def tosses(epoch: int, seed: int) -> list[bool]:
        some = [view_of(record(), key=f"k{i}", epoch=epoch, seed=seed, flip_aug=True) for i in range(64)]
        return [view.crop_left_px == 5 for view in some]

    assert tosses(1, 0) == tosses(1, 0)
    assert len({str(tosses(epoch, seed)) for epoch in range(3) for seed in range(2)}) == 6


def test_a_kept_posterior_is_sampled_by_seed_epoch_and_key() -> None:
    def sample(epoch: int, key: str, *, flip: bool = False) -> torch.Tensor:
        kept = record(logvar=LOGVAR, latents_flipped=None)
        return view_of(kept, key=key, epoch=epoch, seed=1, flip_aug=flip).latents

    assert torch.equal(sample(0, "a"), sample(0, "a"))
    drawn = torch.stack([sample(epoch, f"k{i}") for epoch in range(40) for i in range(40)])
    deviation = torch.from_numpy(np.exp(LOGVAR / 2))
    error = (drawn.mean(0) - torch.from_numpy(LATENTS)).abs() / deviation
    assert error.max() < 5 / np.sqrt(1600) and (drawn.std(0) / deviation - 1).abs().max() < 0.1


def test_flip_aug_without_mirrored_latents_says_what_to_do() -> None:
    with pytest.raises(DataError, match="holds no mirrored latents of 'k'"):
        view_of(record(latents_flipped=None), key="k", epoch=0, seed=0, flip_aug=True)


def test_half_precision_latents_are_trained_on_in_single() -> None:
    half = view_of(record(latents=LATENTS.astype(np.float16)), key="k", epoch=0, seed=0, flip_aug=False)
    assert half.latents.dtype == torch.float32
