"""What a checkpoint carries about its own making, inside the file."""

from __future__ import annotations

import subprocess
from pathlib import Path
from typing import Any

import orjson

from sdxl_core import __version__
from sdxl_core.config import TrainConfig

KEY = "sdxl_flows.lineage"
FORMAT = 1


def lineage_metadata(config: TrainConfig, *, metadata_sha256: str) -> dict[str, str]:
    """One entry for the metadata of a .safetensors: where its run was, what the stages before training said, which

    meta_lat.json it was trained on (by digest: the file may have changed or gone since), and which code did it.
    """
    from sdxl_core.run_record import read_run_record, versions

    stages = read_run_record(config.out / "run.json")["stages"]
    record = {
        "format": FORMAT,
        "run": str(config.out.resolve()),
        "metadata": {"path": str(config.metadata.resolve()), "sha256": metadata_sha256},
        "stages": {name: stage for name, stage in stages.items() if name != "train"},
        "versions": versions(),
        "code": code_identity(),
    }
    return {KEY: orjson.dumps(record).decode()}


def code_identity() -> dict[str, Any]:
    """This package's version and, where it runs from a git checkout, the commit and whether files differ from it."""
    root = Path(__file__).resolve().parents[2]
    commit = _git(root, "rev-parse", "HEAD")
    if commit is None:
        return {"version": __version__, "commit": None, "changed": None}
    return {"version": __version__, "commit": commit, "changed": bool(_git(root, "status", "--porcelain", "-uno"))}


def _git(root: Path, *words: str) -> str | None:
    """What git says about the checkout that this package is in; None where it is in none."""
    if not (root / ".git").exists():
        return None
    command = ["git", "-C", str(root), *words]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=30)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()
