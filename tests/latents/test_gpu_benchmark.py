"""The benchmark for cards runs where there is none, and without Prefect."""

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
CODE = (
    "import runpy, sys\nsys.modules['prefect'] = None\nsys.argv[0] = 'gpu_latents'\n"
    "runpy.run_module('benchmarks.gpu_latents', run_name='__main__')\n"
)


def test_the_benchmark_for_cards_runs_on_the_cpu_with_the_tiny_preset(tmp_path: Path) -> None:
    words = "--preset tiny --device cpu --dtype float32 --pictures 4 --rounds 1 --batch-size 2"
    options = [*words.split(), "--out"]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-c", CODE, *options, str(tmp_path / "told.md")],
        cwd=ROOT, env=environment, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    told = (tmp_path / "told.md").read_text()
    assert "| 1024 x 1024 |" in told and "| mixed buckets |" in told and "tiny VAE, float32, batch 2" in told
