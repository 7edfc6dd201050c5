"""The training benchmark for a card runs on a machine without Prefect; here with the tiny preset on the CPU."""

import os
import subprocess
import sys
from pathlib import Path

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "gpu_train.py"


def test_the_benchmark_runs_without_prefect(tmp_path: Path) -> None:
    """Its processes too, from any folder: a module named prefect that cannot be imported stands in their way."""
    (tmp_path / "no" / "prefect").mkdir(parents=True)
    (tmp_path / "no" / "prefect" / "__init__.py").write_text("raise ImportError('prefect is not here')")
    command = [
        sys.executable, str(SCRIPT), "--preset", "tiny", "--device", "cpu", "--resolution-px", "64", "--steps", "1",
        "--quick", "--only", "24 GB", "--out", str(tmp_path / "result.md"),
    ]  # fmt: skip
    environment = os.environ | {"PYTHONPATH": str(tmp_path / "no"), "OMP_NUM_THREADS": "1"}
    ended = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert ended.returncode == 0, ended.stderr[-2000:]
    row = next(line for line in (tmp_path / "result.md").read_text().splitlines() if "24 GB preset" in line)
    assert len(row.split("|")) == 8 and row.split("|")[3:] != [" "] * 5, row
