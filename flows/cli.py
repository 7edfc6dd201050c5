"""What `sdxl-flows` does when a flow is asked for. Imported only then."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import orjson

from flows.cache_latents import cache_latents
from flows.catalog import catalog
from flows.finetune import finetune
from flows.interrupts import insistent_interrupts
from flows.merge_tags import merge_tags
from flows.pipeline import pipeline
from flows.statistics import statistics
from flows.subset import subset
from flows.temporary_server import start_temporary_server
from flows.verify_latents import verify_latents
from sdxl_core.cli import print_result
from sdxl_core.config import JobConfig
from sdxl_core.preflight import check_job
from sdxl_core.refs import RunRef
from sdxl_core.report.curves import tensorboard_command
from sdxl_core.run_record import read_run_record, record_stage, summaries

STAGE_FLOWS: dict[str, Callable[[Any], Any]] = {
    "catalog": catalog,
    "subset": subset,
    "statistics": statistics,
    "merge-tags": merge_tags,
    "cache-latents": cache_latents,
    "verify": verify_latents,
    "train": finetune,
}


def run_stage(name: str, config: Any, *, as_json: bool) -> None:
    """Run one stage as its flow and print its result."""
    with insistent_interrupts():
        start_temporary_server()
        ref = STAGE_FLOWS[name](config)
    if name in ("cache-latents", "train"):
        record_stage(config.out, name, config, ref)
    print_result(ref, as_json=as_json)


def run_job(job: JobConfig, *, as_json: bool) -> None:
    """Run the whole path and say what it left."""
    check_job(job)  # before the flow: a mistake needs no server to be told
    with insistent_interrupts():
        start_temporary_server()
        run: RunRef = pipeline(job)
    if as_json:
        print(orjson.dumps(read_run_record(run.path), option=orjson.OPT_INDENT_2).decode())
        return
    print()
    for line in summaries(run.path):
        print(line)
    print(f"look:   {run.report}")
    if run.lineage is not None:
        print(f"from:   {run.lineage}")
    print(f"curves: {tensorboard_command(job.out / 'tensorboard')}")
