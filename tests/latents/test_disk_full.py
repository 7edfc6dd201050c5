"""A disk that fills up in the middle: one clear paragraph, everything committed is kept, more room finishes the job."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from support.pictures import encoded, picture

from sdxl_core.latents.cache import cache_latents

SCRIPT = """
set -u
mount -t tmpfs -o size=160k tmpfs "$OUT"
"$PYTHON" -m sdxl_core.cli cache-latents $OPTIONS; echo "status $?"
find "$OUT/latents" -name '*.npz' | wc -l
mount -o remount,size=50m "$OUT"
"$PYTHON" -m sdxl_core.cli cache-latents $OPTIONS; echo "status $?"
cp -rp "$OUT" "$COPY"
"""


def can_mount(folder: Path) -> bool:
    command = ["unshare", "-rm", "mount", "-t", "tmpfs", "tmpfs", str(folder)]
    try:
        return subprocess.run(command, capture_output=True, check=False).returncode == 0
    except FileNotFoundError:
        return False


def test_a_full_disk_loses_nothing_that_was_committed(make_job: Any, tmp_path: Path) -> None:
    disk = tmp_path / "disk"
    disk.mkdir()
    if not can_mount(disk):
        pytest.skip("this machine does not let a test mount a small tmpfs (unshare -rm)")
    files = {f"{number:02}.png": encoded(picture(64, 64, seed=number), "PNG") for number in range(60)}
    config = make_job(files, commit_size=4)
    calm = config.model_copy(update={"out": tmp_path / "calm"})
    cache_latents(calm)
    options = (
        f"--source {config.source} --metadata {config.metadata} --out {disk} --vae tiny --commit-size 4 --devices cpu "
        "--resolution-px 64 --min-bucket-px 32 --max-bucket-px 128 --bucket-step-px 32"
    )
    environment = os.environ | {
        "OUT": str(disk), "COPY": str(tmp_path / "copy"), "OPTIONS": options, "PYTHON": sys.executable,
        "PYTHONPATH": str(Path(__file__).parents[2]),
    }  # fmt: skip
    done = subprocess.run(
        ["unshare", "-rm", "sh", "-c", SCRIPT], env=environment, capture_output=True, text=True, check=True
    )
    statuses = [line for line in done.stdout.splitlines() if line.startswith("status")]
    assert statuses == ["status 1", "status 0"], done.stderr
    assert "the disk is full" in done.stderr and "continues where it stopped" in done.stderr
    assert "Traceback" not in done.stderr
    num_written = int(next(line for line in done.stdout.splitlines() if line.isdigit()))
    assert 0 < num_written < 60
    for path in calm.out.rglob("*.npz"):
        assert (tmp_path / "copy" / path.relative_to(calm.out)).read_bytes() == path.read_bytes()
    assert (tmp_path / "copy" / "meta_lat.json").read_bytes() == (calm.out / "meta_lat.json").read_bytes()
