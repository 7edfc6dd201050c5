"""The README's commands, run exactly as printed, in order."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text("utf-8")
COMMANDS = [line for block in re.findall(r"```sh\n(.*?)```", README, re.DOTALL) for line in block.splitlines()]


@pytest.fixture(scope="module")
def checkout(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder that looks like the checkout; the environment that runs the tests takes the place of `.venv`."""
    folder = tmp_path_factory.mktemp("checkout")
    for name in ("Makefile", "examples", "pyproject.toml", "constraints.txt"):
        (folder / name).symlink_to(ROOT / name)
    (folder / ".venv").mkdir()
    (folder / ".venv" / "bin").symlink_to(Path(sys.executable).parent)
    (folder / ".venv" / ".ready").touch()
    return folder


def test_the_readme_begins_with_the_demo() -> None:
    assert COMMANDS[0] == "make demo" and len(COMMANDS) >= 5


def test_every_command_of_the_readme_works_as_printed(checkout: Path) -> None:
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    environment = os.environ | {"PATH": path, "PREFECT_HOME": str(checkout / "prefect")}
    for command in COMMANDS:
        done = subprocess.run(
            command, shell=True, cwd=checkout, env=environment, capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, f"{command}\n{done.stdout[-3000:]}\n{done.stderr[-3000:]}"
        assert "Traceback" not in done.stderr, f"{command}\n{done.stderr[-3000:]}"
        if command == "make demo":
            shown = re.findall(r"^(?:drew|subset|merge|latents|look|from|curves).*", README, re.MULTILINE)
            shown = [line.replace(" .venv/bin/", f" {Path(sys.executable).parent}/") for line in shown]
            assert len(shown) == 7 and set(shown) <= set(done.stdout.splitlines())
    for name in ("model/last.safetensors", "report.html", "run.json", "meta_lat.json", "rejected.jsonl"):
        assert (checkout / "out" / "demo" / name).is_file(), name
    assert len(list((checkout / "out" / "mine" / "latents").glob("*.npz"))) == 36
    assert (checkout / "out" / "job" / "model" / "last.safetensors").is_file()


def test_every_file_the_readme_names_exists() -> None:
    links = re.findall(r"\]\((?!http)([^)#]+)\)", README)
    first_columns = re.findall(r"^\| (`[^|]+) \|", README, re.MULTILINE)
    mapped = [name for column in first_columns for name in re.findall(r"`([\w./]+/[\w./]*)`", column)]
    places = (ROOT, ROOT / "sdxl_core")
    missing = [name for name in links + mapped if not any((place / name).exists() for place in places)]
    assert links and mapped and not missing
