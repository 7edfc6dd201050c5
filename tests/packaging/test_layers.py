"""Four layers, arrows only downwards; the core needs no Prefect."""

import ast
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
FORBIDDEN = {
    "sdxl_core": {"prefect", "tasks", "flows", "deployments"},
    "tasks": {"flows", "deployments", "torch", "numpy", "PIL", "cv2"},
    "flows": {"deployments", "torch", "numpy", "PIL", "cv2"},
}


def imported_packages(path: Path) -> Iterator[str]:
    for node in ast.walk(ast.parse(path.read_text("utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name.split(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            yield node.module.split(".")[0]


@pytest.mark.parametrize("layer", FORBIDDEN)
def test_imports_point_only_downwards(layer: str) -> None:
    upwards = {
        f"{path.relative_to(ROOT)} imports {name}"
        for path in (ROOT / layer).rglob("*.py")
        for name in imported_packages(path)
        if name in FORBIDDEN[layer]
    }
    assert not upwards


@pytest.fixture(scope="session")
def without_prefect(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """An environment that holds every installed package except Prefect, its server's packages, and our flows."""
    links = tmp_path_factory.mktemp("site-without-prefect")
    hidden = ("prefect", "fastapi", "starlette", "uvicorn", "docket", "__editable__", "sdxl_flows")
    for folder in {Path(entry) for entry in sys.path if entry.endswith("site-packages")}:
        for entry in folder.iterdir():
            if not entry.name.lower().startswith(hidden):
                (links / entry.name).symlink_to(entry)
    for layer in ("sdxl_core", "flows", "tasks"):
        (links / layer).symlink_to(ROOT / layer)
    return {"PATH": os.environ["PATH"], "PYTHONPATH": str(links), "HOME": str(links.parent), "OMP_NUM_THREADS": "1"}


def run(environment: dict[str, str], cwd: Path, *argv: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-S", "-m", "sdxl_core.cli", *argv]
    return subprocess.run(command, env=environment, cwd=cwd, capture_output=True, text=True, check=False)


def test_stage_commands_work_where_prefect_is_not_installed(without_prefect: dict[str, str], tmp_path: Path) -> None:
    from sdxl_core.demo import draw_samples

    draw_samples(tmp_path / "pictures")
    merged = run(without_prefect, tmp_path, "merge-tags", "--source", "pictures", "--out", "run/meta_cap_dd.json")
    assert merged.returncode == 0, merged.stderr
    cached = run(
        without_prefect, tmp_path, "cache-latents", "--source", "pictures", "--metadata", "run/meta_cap_dd.json",
        "--out", "run", "--vae", "tiny", "--resolution-px", "128", "--min-bucket-px", "64", "--max-bucket-px", "256",
    )  # fmt: skip
    assert cached.returncode == 0, cached.stderr
    assert "kept 48 of 50 pictures (2 rejected: 1 too_small, 1 undecodable)" in cached.stdout
    assert len(list((tmp_path / "run" / "latents").glob("*.npz"))) == 48


def test_a_flow_without_prefect_is_explained(without_prefect: dict[str, str], tmp_path: Path) -> None:
    done = run(without_prefect, tmp_path, "demo", "--out", "out")
    assert done.returncode == 2 and "Prefect is not installed here" in done.stderr and "Traceback" not in done.stderr


def test_doctor_tells_that_prefect_is_missing(without_prefect: dict[str, str], tmp_path: Path) -> None:
    done = run(without_prefect, tmp_path, "doctor")
    assert "stage commands work, flows (demo, run, --flow) do not" in done.stdout


def test_the_core_imports_on_windows_too() -> None:
    """No module of the core needs a Unix-only module just to be imported."""
    unix_only = {"fcntl", "resource", "pwd", "grp", "termios", "pty", "posix"}
    needed = {
        f"{path.relative_to(ROOT)} imports {alias.name}"
        for path in (ROOT / "sdxl_core").rglob("*.py")
        for node in ast.parse(path.read_text("utf-8")).body
        if isinstance(node, ast.Import)
        for alias in node.names
        if alias.name in unix_only
    }
    assert not needed
