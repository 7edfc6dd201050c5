"""`run.json`: what a run folder holds and how it came to be: configs, references with digests, versions, times."""

from __future__ import annotations

import importlib.metadata
import platform
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import orjson
from pydantic import BaseModel

from sdxl_core import __version__
from sdxl_core.files import write_atomic
from sdxl_core.refs import to_json

PACKAGES = ("torch", "diffusers", "transformers", "accelerate", "bitsandbytes", "safetensors", "numpy", "prefect")


def versions() -> dict[str, str]:
    """Python, this package and the packages that shape its results; one that is not installed is left out."""
    found = {"sdxl-flows": __version__, "python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def record_stage(out: Path, stage: str, config: BaseModel, ref: Any) -> None:
    """Set one stage's entry in `out/run.json`, keep the others. An unchanged entry keeps its time."""
    path = out / "run.json"
    record = read_run_record(path)
    entry = {"config": config.model_dump(mode="json"), "result": to_json(ref), "versions": versions()}
    old = record["stages"].get(stage, {})
    if {key: value for key, value in old.items() if key != "finished"} == entry:
        return
    record["stages"][stage] = entry | {"finished": datetime.now(UTC).isoformat(timespec="seconds")}
    write_atomic(path, orjson.dumps(record, option=orjson.OPT_INDENT_2 | orjson.OPT_APPEND_NEWLINE))


def read_run_record(path: Path) -> dict[str, Any]:
    """`run.json` as a dict with a `stages` dict; a missing or foreign file counts as empty."""
    try:
        record = orjson.loads(path.read_bytes())
    except (FileNotFoundError, orjson.JSONDecodeError):
        record = None
    if isinstance(record, dict) and isinstance(record.get("stages"), dict):
        return record
    return {"format": 1, "stages": {}}
