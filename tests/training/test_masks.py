"""Alpha masks come from the latent record and reach the loss."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from sdxl_core.config import TrainConfig
from sdxl_core.errors import ConfigError
from sdxl_core.training.batches import BatchMaker
from sdxl_core.training.preflight import check_latents
from sdxl_core.training.training_set import read_training_set


def test_a_batch_has_the_masks_of_its_pictures(make_latents: Callable[..., tuple[Path, Path]], tmp_path: Path) -> None:
    metadata, latents = make_latents(tmp_path, num_samples=4)  # pic00 and pic03 share a bucket of 64x64
    with np.load(latents / "pic03.npz") as file:
        arrays = dict(file)
    alpha = np.zeros((64, 64), np.float32)
    alpha[:32] = 1.0
    np.savez(latents / "pic03.npz", **arrays, alpha_mask=alpha)
    for masked in (True, False):
        config = TrainConfig(
            metadata=metadata, latents=latents, out=tmp_path / "run", train_batch_size=2, masked_loss=masked
        )  # fmt: skip
        training_set = read_training_set(config)
        plan = training_set.plan(config)
        maker = BatchMaker(training_set, plan, config, rank=0)
        batches = [maker.make(step, 0) for step in range(plan.num_steps)]
        found = {
            key: batch.mask[i, 0] for batch in batches if batch.mask is not None for i, key in enumerate(batch.keys)
        }
        assert set(found) == ({"pic00", "pic03"} if masked else set())
        if masked:
            assert torch.equal(found["pic03"], torch.from_numpy(alpha)) and found["pic00"].min() == 1


def test_masked_loss_without_masks_is_refused(config: Callable[..., TrainConfig]) -> None:
    run = config(masked_loss=True)
    with pytest.raises(ConfigError, match=r"masked_loss: .* holds no masks .* Run cache-latents with alpha_mask"):
        check_latents(run, read_training_set(run))
    check_latents(config(), read_training_set(config()))
