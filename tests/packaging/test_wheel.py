"""The built wheel, installed into a clean environment outside the checkout, does what the checkout does."""

import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SHIPPED = ("sdxl_core", "tasks", "flows", "deployments", "pyproject.toml", "README.md", "LICENSE", "LICENSES")


@pytest.fixture(scope="session")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A fresh virtual environment with the wheel; third-party packages come from the running one by path."""
    folder = tmp_path_factory.mktemp("wheel")
    tree, environment = folder / "tree", folder / "env"
    tree.mkdir()
    for name in SHIPPED:
        source = ROOT / name
        if source.is_dir():
            shutil.copytree(source, tree / name, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(source, tree / name)
    pip = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check"]
    subprocess.run([*pip, "wheel", "--no-deps", "--no-build-isolation", "-w", folder, tree], check=True)
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", environment], check=True)
    (wheel,) = folder.glob("sdxl_flows-*.whl")
    subprocess.run([*pip, "--python", environment / "bin/python", "install", "--no-deps", wheel], check=True)
    (site,) = environment.glob("lib/python*/site-packages")
    (site / "third_party.pth").write_text(sysconfig.get_paths()["purelib"] + "\n")
    return environment


def run(environment: Path, cwd: Path, *argv: str, **variables: str) -> subprocess.CompletedProcess[str]:
    env = {"PATH": os.environ["PATH"], "HOME": str(cwd), "PREFECT_HOME": str(cwd / "prefect"), "OMP_NUM_THREADS": "1"}
    command = [str(environment / "bin" / "sdxl-flows"), *argv]
    return subprocess.run(command, env=env | variables, cwd=cwd, capture_output=True, text=True, check=False)


def python(environment: Path, cwd: Path, code: str) -> subprocess.CompletedProcess[str]:
    command = [environment / "bin/python", "-c", code]
    return subprocess.run(command, cwd=cwd, capture_output=True, text=True, check=False)


def collection(folder: Path) -> Path:
    folder.mkdir()
    (folder / "a.png").write_bytes(b"not opened by merging")
    (folder / "a.txt").write_text("1girl, solo")
    return folder


def test_the_installed_package_is_not_the_checkout(installed: Path, tmp_path: Path) -> None:
    code = "import sdxl_core, tasks, flows; print(sdxl_core.__file__, tasks.__file__, flows.__file__)"
    done = subprocess.run(
        [installed / "bin/python", "-c", code], cwd=tmp_path, capture_output=True, text=True, check=True
    )
    assert done.stdout.count(str(installed)) == 3


def test_the_tiny_model_comes_along(installed: Path, tmp_path: Path) -> None:
    code = "import torch; from sdxl_core.models.load import load_vae; load_vae('tiny', dtype=torch.float32)"
    done = subprocess.run(
        [installed / "bin/python", "-c", code], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr


def test_a_flow_runs_from_the_wheel(installed: Path, tmp_path: Path) -> None:
    collection(tmp_path / "pictures")
    done = run(installed, tmp_path, "merge-tags", "--flow", "--source", "pictures", "--out", "m.json")
    assert done.returncode == 0, done.stderr
    assert "kept 1 of 1 picture" in done.stdout and (tmp_path / "m.json").exists()


def test_somebody_elses_tasks_package_is_told_not_run(installed: Path, tmp_path: Path) -> None:
    foreign = tmp_path / "other" / "tasks"
    foreign.mkdir(parents=True)
    (foreign / "__init__.py").write_text("")
    collection(tmp_path / "pictures")
    done = run(
        installed, tmp_path, "merge-tags", "--flow", "--source", "pictures", "--out", "m.json",
        PYTHONPATH=str(tmp_path / "other"),
    )  # fmt: skip
    assert done.returncode == 2 and "hides the one of sdxl-flows" in done.stderr and "Traceback" not in done.stderr
