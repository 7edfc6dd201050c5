"""Keep the run's record: every reference, config and version in run.json, and the report page."""

from pathlib import Path
from typing import Any

from prefect import task
from prefect.artifacts import create_link_artifact
from pydantic import BaseModel

from sdxl_core import run_record as core
from sdxl_core.config import JobConfig
from sdxl_core.refs import RunRef
from tasks.policies import ONCE


@task(name="record-stage", task_run_name="record-{stage}", **ONCE)
def record_stage(out: Path, stage: str, config: BaseModel, ref: Any) -> None:
    """Set a stage's entry in run.json."""
    core.record_stage(out, stage, config, ref)


@task(name="finish-run", **ONCE)
def finish_run(job: JobConfig) -> RunRef:
    """Record the whole job and draw its report."""
    ref = core.finish_run(job)
    create_link_artifact(key="run-report", link=ref.report.resolve().as_uri(), description="report of the whole run")
    return ref
