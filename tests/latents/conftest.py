"""Latent caches over small collections."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from sdxl_core.config import CacheLatentsConfig

SMALL = {
    "vae": "tiny", "resolution_px": 64, "min_bucket_px": 32, "max_bucket_px": 128, "bucket_step_px": 32,
    "devices": "cpu",
}  # fmt: skip
MakeJob = Callable[..., CacheLatentsConfig]


@pytest.fixture
def make_job(tmp_path: Path) -> MakeJob:
    """make_job({"a.png": bytes, …}, **options): the files, a metadata JSON naming each, and a config over them."""

    def make(files: dict[str, bytes], **options: Any) -> CacheLatentsConfig:
        for name, data in files.items():
            path = tmp_path / "in" / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(data)
        metadata = {name.rpartition(".")[0]: {"tags": f"tag of {name}", "score": 3} for name in files}
        (tmp_path / "meta.json").write_text(json.dumps(metadata))
        places = {"source": tmp_path / "in", "metadata": tmp_path / "meta.json", "out": tmp_path / "out"}
        return CacheLatentsConfig(**places | SMALL | options)

    return make
