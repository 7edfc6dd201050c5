"""One tiny model for all tests of this folder, in memory, as a single file and as a diffusers folder."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from sdxl_core.models import SdxlModels, load_models, save_diffusers_folder, save_single_file


@pytest.fixture(scope="session")
def tiny() -> SdxlModels:
    return load_models("tiny", dtype=torch.float32, seed=3)


@pytest.fixture(scope="session")
def single_file(tiny: SdxlModels, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("single") / "tiny.safetensors"
    save_single_file(path, tiny, precision="fp32", metadata={})
    return path


@pytest.fixture(scope="session")
def folder(tiny: SdxlModels, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("folder") / "tiny"
    save_diffusers_folder(path, tiny, precision="fp32")
    return path
