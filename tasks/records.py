"""Keep the run's record: every reference, config and version in run.json, and the report page."""

from pathlib import Path
from typing import Any

from prefect import task
from pydantic import BaseModel

from sdxl_core import run_record as core
from sdxl_core.config import CacheLatentsConfig, JobConfig
from sdxl_core.refs import RunRef
from tasks.artifacts import show_run
from tasks.policies import ONCE


@task(name="record-stage", task_run_name="record-{stage}", **ONCE)
def record_stage(out: Path, stage: str, config: BaseModel, ref: Any) -> None:
    """Set a stage's entry in run.json."""
    core.record_stage(out, stage, config, ref)


@task(name="finish-run", **ONCE)
def finish_run(job: JobConfig) -> RunRef:
    """Record the whole job, draw its report and its lineage, and show both."""
    ref = core.finish_run(job)
    show_run(ref, latents=core.stage_config(ref.path, "cache-latents", CacheLatentsConfig))
    return ref
