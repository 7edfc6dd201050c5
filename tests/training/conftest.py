"""A small latent cache as sd-scripts would have left it, and a training config on it."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import orjson
import pytest
import torch
from accelerate.state import AcceleratorState
from safetensors.torch import save_file

from sdxl_core.config import TrainConfig
from sdxl_core.files import sha256_file
from sdxl_core.training import loop
from sdxl_core.training.processes import StopSignal
from sdxl_core.training.state import read_generation

BUCKETS_PX = ((64, 64), (128, 64), (64, 96))  # width, height


def write_latents(folder: Path, *, num_samples: int) -> tuple[Path, Path]:
    """`num_samples` pictures in three buckets. Returns (meta_lat.json, latents folder)."""
    latents = folder / "latents"
    latents.mkdir(parents=True)
    metadata: dict[str, Any] = {}
    for i in range(num_samples):
        width_px, height_px = BUCKETS_PX[i % len(BUCKETS_PX)]
        rng = np.random.Generator(np.random.Philox(key=i))
        np.savez(
            latents / f"pic{i:02d}.npz",
            latents=(4.0 * rng.standard_normal((4, height_px // 8, width_px // 8))).astype(np.float32),
            original_size=np.array([width_px * 3, height_px * 2 + i]),
            crop_ltrb=np.array([float(i), 2.5, width_px + float(i), height_px + 2.5]),
        )
        metadata[f"pic{i:02d}"] = {"tags": f"boat, sea, t{i}, blue", "train_resolution": [width_px, height_px]}
        if i % 2:
            metadata[f"pic{i:02d}"]["caption"] = f"Boat number {i}, at sea."
    (folder / "meta_lat.json").write_bytes(orjson.dumps(metadata, option=orjson.OPT_INDENT_2))
    return folder / "meta_lat.json", latents


class StopAt(StopSignal):
    """Asks to stop during the `step`-th optimizer step from here, as a SIGTERM then would."""

    def __init__(self, step: int) -> None:
        self._asked, self._step = 0, step

    @property
    def received(self) -> bool:  # type: ignore[override]
        self._asked += 1
        return self._asked >= self._step

    def is_set(self) -> bool:
        return self._asked >= self._step


@pytest.fixture(scope="session")
def train() -> Callable[..., bool]:
    """A whole run in this process, on one thread as a launched one. accelerate keeps one state a process."""

    def run(config: TrainConfig, *, stop_at: int = 10**9, stop: StopSignal | None = None) -> bool:
        threads = torch.get_num_threads()
        torch.set_num_threads(1)
        AcceleratorState._reset_state(reset_partial_state=True)
        try:
            return loop.train(config, stop=stop or StopAt(stop_at))
        finally:
            AcceleratorState._reset_state(reset_partial_state=True)
            torch.set_num_threads(threads)

    return run


@pytest.fixture
def make_latents() -> Callable[..., tuple[Path, Path]]:
    """`write_latents`, for tests that change what it made."""
    return write_latents


@pytest.fixture(scope="session")
def cache(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Ten pictures: buckets of 4, 3 and 3. Not to be changed by a test."""
    return write_latents(tmp_path_factory.mktemp("cache"), num_samples=10)


@pytest.fixture
def config(cache: tuple[Path, Path], tmp_path: Path) -> Callable[..., TrainConfig]:
    """A config on the small cache; keywords change it."""

    def make(**changes: Any) -> TrainConfig:
        metadata, latents = cache
        values = {
            "metadata": metadata, "latents": latents, "out": tmp_path / "run", "max_train_steps": 6,
            "train_batch_size": 2, "learning_rate": 1e-3, "use_cpu": True, "save_precision": "fp32",
        }  # fmt: skip
        return TrainConfig.model_validate(values | changes)

    return make


@pytest.fixture
def as_written_before() -> Callable[[Path, list[float]], dict[str, Any]]:
    """Makes a state of one process what version 0.1 left: all about the run in its manifest, losses in a file.

    losses: that of step n at place n modulo an epoch.
    """

    def rewrite(path: Path, losses: list[float]) -> dict[str, Any]:
        now = read_generation(path)
        save_file({"window": torch.tensor(losses, dtype=torch.float64)}, path / "losses.safetensors")
        files = {name: {"file": f"{name}.safetensors", "sha256": sha256_file(path / f"{name}.safetensors")}
                 for name in (*now.tensors, "losses")}  # fmt: skip
        about = {key: value for key, value in now.run.items() if key != "settings"}
        scalars = {"optimizer": now.parts[0].numbers, "loss_total": now.scalars["losses"]["total"], **about}
        scalars["guard"] = now.scalars.get("guard")
        parts = [{"files": files, "scalars": scalars, "pieces": {}}]
        manifest = {"format": 2, "step": now.step, "settings": now.run["settings"], "parts": parts}
        (path / "manifest.json").write_bytes(orjson.dumps(manifest))
        return manifest

    return rewrite
