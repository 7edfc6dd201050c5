"""When a task is retried, what its cached result is filed under, and how its failure reads."""

from __future__ import annotations

import logging
from dataclasses import dataclass, is_dataclass
from typing import Any

import orjson
from prefect.cache_policies import NO_CACHE, CachePolicy
from prefect.client.schemas.objects import State, TaskRun
from prefect.context import TaskRunContext
from prefect.tasks import Task
from pydantic import BaseModel

from sdxl_core import __version__
from sdxl_core.errors import SdxlFlowsError, TransientError
from sdxl_core.files import digest_of
from sdxl_core.refs import to_json


def is_transient(task: Task[..., Any], task_run: TaskRun, state: State[Any]) -> bool:
    """Retry only what may go away by itself; a user's mistake fails at once."""
    try:
        state.result()
    except TransientError:
        return True
    except Exception:  # any other failure, whatever it is, is not retried
        return False
    return False


@dataclass
class ByContent(CachePolicy):
    """Key = task name, package version and the content of every config and reference among the inputs.

    References carry content digests, so a touched file hits and a changed one misses. Prefect's cache cannot notice
    deleted outputs: the caller asks the ledger first and sets `refresh_cache` (see flows/cache_latents.py).
    """

    def compute_key(
        self, task_ctx: TaskRunContext, inputs: dict[str, Any], flow_parameters: dict[str, Any], **kwargs: Any
    ) -> str | None:
        parts = [task_ctx.task.name, __version__]
        for name in sorted(inputs):
            value = inputs[name]
            if isinstance(value, BaseModel):
                parts += [name, value.model_dump_json()]
            elif is_dataclass(value):
                parts += [name, orjson.dumps(to_json(value), option=orjson.OPT_SORT_KEYS).decode()]
        return digest_of(*parts)


ONCE: dict[str, Any] = {"cache_policy": NO_CACHE, "persist_result": False}
RETRIED: dict[str, Any] = {
    "retries": 4,
    "retry_delay_seconds": [5, 20, 80, 320],  # exponential
    "retry_jitter_factor": 0.3,
    "retry_condition_fn": is_transient,
}
CACHED: dict[str, Any] = {"cache_policy": ByContent(), "persist_result": True, "result_serializer": "json"}


class _NoTraceback(logging.Filter):
    """A user's mistake is logged as its one paragraph, not as a traceback through Prefect."""

    def filter(self, record: logging.LogRecord) -> bool:
        error = record.exc_info[1] if isinstance(record.exc_info, tuple) else None
        if isinstance(error, SdxlFlowsError):
            record.msg, record.args, record.exc_info, record.exc_text = str(error), (), None, None
        return True


for _name in ("prefect.task_runs", "prefect.flow_runs"):
    logging.getLogger(_name).addFilter(_NoTraceback())
