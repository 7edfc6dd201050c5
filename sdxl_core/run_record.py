"""`run.json`: what a run folder holds and how it came to be: configs, references with digests, versions, times."""

from __future__ import annotations

import importlib.metadata
import platform
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, TypeVar

import orjson
from pydantic import BaseModel

from sdxl_core import __version__
from sdxl_core.config import JobConfig
from sdxl_core.errors import CheckpointError, DataError
from sdxl_core.files import sha256_file, write_atomic
from sdxl_core.refs import RunRef, SubsetRef, to_json
from sdxl_core.rejected import read_rejected, update_rejected
from sdxl_core.report import write_report
from sdxl_core.summary import describe

C = TypeVar("C", bound=BaseModel)
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
    """Set one stage's entry in `out/run.json`, keep the others. An unchanged entry keeps its time.

    What a subset rejected into a list of its own is copied into `out/rejected.jsonl`.
    """
    path = out / "run.json"
    if isinstance(ref, SubsetRef):
        update_rejected(out / "rejected.jsonl", "subset", read_rejected(ref.rejected))
    record = read_run_record(path)
    entry = {
        "summary": describe(ref),
        "config": config.model_dump(mode="json"),
        "result": to_json(ref),
        "versions": versions(),
    }
    old = record["stages"].get(stage, {})
    if {key: value for key, value in old.items() if key != "finished"} == entry:
        return
    record["stages"][stage] = entry | {"finished": datetime.now(UTC).isoformat(timespec="seconds")}
    _write(path, record)


def finish_run(job: JobConfig) -> RunRef:
    """Record the job's resolved config, draw the report and the lineage page: the last step of a whole run.

    Raises: DataError: a stage has left no entry in `run.json`.
    """
    path = job.out / "run.json"
    record = read_run_record(path)
    if "train" not in record["stages"]:
        raise DataError(f"{path}: holds no finished training. Run the job again; finished stages are not redone.")
    config = job.model_dump(mode="json")
    if record.get("job") != config:
        _write(path, record | {"job": config})
    checkpoint = Path(record["stages"]["train"]["result"]["file"]["path"])
    lineage = _write_lineage(checkpoint, job.out)
    return RunRef(
        path=path, sha256=sha256_file(path), checkpoint=checkpoint, report=write_report(job.out), lineage=lineage
    )


def _write_lineage(checkpoint: Path, out: Path) -> Path | None:
    """`out/lineage.html`; None where the model carries no record of its making: the run is good without."""
    from sdxl_core.lineage import trace
    from sdxl_core.lineage.show import write_lineage_page

    if not checkpoint.exists():
        return None
    try:
        return write_lineage_page(trace(checkpoint, run=out), out / "lineage.html")
    except CheckpointError:
        return None


def _write(path: Path, record: dict[str, Any]) -> None:
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


def summaries(path: Path) -> list[str]:
    """What every stage of a run said."""
    return [stage["summary"] for stage in read_run_record(path)["stages"].values()]


def stage_config(path: Path, stage: str, kind: type[C]) -> C:
    """The parameters that a finished stage was run with."""
    return kind.model_validate(read_run_record(path)["stages"][stage]["config"])
