"""The nightly check as a flow."""

import json
from pathlib import Path

import pytest
from support.latent_sets import collection, contents

from sdxl_core.config import CacheLatentsConfig, VerifyLatentsConfig
from sdxl_core.errors import ShardError
from sdxl_core.latents.cache import cache_latents

pytestmark = pytest.mark.usefixtures("prefect_server")


def test_a_damaged_set_fails_the_nightly_run_and_repair_mends_it(tmp_path: Path) -> None:
    from flows.verify_latents import verify_latents

    for name, data in collection(3).items():
        (tmp_path / "in" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "in" / name).write_bytes(data)
    (tmp_path / "meta.json").write_text(json.dumps({"000": {}, "001": {}, "002": {}}))
    config = CacheLatentsConfig(
        source=tmp_path / "in", metadata=tmp_path / "meta.json", out=tmp_path / "out", vae="tiny", resolution_px=64,
        min_bucket_px=32, max_bucket_px=128, bucket_step_px=32, devices="cpu", layout="packed",
    )  # fmt: skip
    cache_latents(config)
    right = contents(config.out)
    assert verify_latents(VerifyLatentsConfig(path=config.out)).num_rows == 3
    path = next((config.out / "latents" / "packed").rglob("*.npz"))
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(ShardError, match="--repair"):
        verify_latents(VerifyLatentsConfig(path=config.out))
    assert verify_latents(VerifyLatentsConfig(path=config.out, repair=True)).num_repaired > 0
    assert contents(config.out) == right
