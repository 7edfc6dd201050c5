"""What a run shows in the browser: progress, counts, histograms, links. Artifacts mirror references, nothing else."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from uuid import UUID

from prefect import get_run_logger, runtime
from prefect.artifacts import (
    create_link_artifact,
    create_markdown_artifact,
    create_progress_artifact,
    create_table_artifact,
    update_progress_artifact,
)
from prefect.events import emit_event

from sdxl_core.refs import CheckpointRef, LatentSetRef, LatentShardRef, to_json
from sdxl_core.rejected import count_reasons, read_rejected
from sdxl_core.summary import describe

MIN_SECONDS_BETWEEN_UPDATES = 10.0
MIN_SECONDS_BETWEEN_EVENTS = 60.0
PROGRESS_EVENT = "sdxl-flows.progress"  # what the "stuck" notification waits for


@contextmanager
def never_failing(what: str) -> Iterator[None]:
    """What is shown must not cost what it tells about: a server that does not answer is a warning."""
    try:
        yield
    except Exception as error:
        get_run_logger().warning("%s could not be shown in the browser: %s", what, error)


class ProgressArtifact:
    """A core `Progress` that draws one progress artifact and logs the same line, at most once in 10 s."""

    def __init__(self, key: str, description: str) -> None:
        self._key, self._description = key, description
        self._artifact: UUID | None = None
        self._last_update = self._last_event = float("-inf")
        self._last_done = -1
        self._lock = threading.Lock()

    def __call__(self, stage: str, done: int, total: int, note: str = "") -> None:
        with never_failing("the progress"):
            self._show(done, total, note)

    def _show(self, done: int, total: int, note: str) -> None:
        now = time.monotonic()
        with self._lock:
            if done < total and now - self._last_update < MIN_SECONDS_BETWEEN_UPDATES:
                return
            self._last_update = now
            percent = 100.0 * done / total if total else 100.0
            self._emit(done, now)
            text = f"{self._description}: {done} of {total}" + (f", {note}" if note else "")
            get_run_logger().info(text)
            if self._artifact is None:
                created = create_progress_artifact(progress=percent, key=self._key, description=text)
                assert isinstance(created, UUID)
                self._artifact = created
            else:
                update_progress_artifact(self._artifact, progress=percent, description=text)

    def _emit(self, done: int, now: float) -> None:
        """Tell the server that the run gets on, at most once a minute and only if it does."""
        if done <= self._last_done or now - self._last_event < MIN_SECONDS_BETWEEN_EVENTS:
            return
        self._last_event, self._last_done = now, done
        run = runtime.flow_run.root_flow_run_id  # the run that a person or a schedule has started
        emit_event(PROGRESS_EVENT, {"prefect.resource.id": f"prefect.flow-run.{run}"})


@never_failing("a result")
def show_result(ref: Any, *, key: str, title: str) -> None:
    """A table of the reference's numbers and a markdown summary with the reasons of what was rejected."""
    fields = to_json(ref)
    numbers = [{"what": name, "value": value} for name, value in fields.items() if not isinstance(value, (dict, list))]
    create_table_artifact(key=f"{key}-counts", table=numbers, description=describe(ref))
    lines = [f"# {title}", "", describe(ref), ""]
    if fields.get("num_rejected"):
        reasons = count_reasons(row for row in read_rejected(ref.rejected) if row.stage == key)
        lines += ["| rejected because | pictures |", "|---|---|"]
        lines += [f"| {reason} | {count} |" for reason, count in reasons.items()]
        lines += ["", f"Each with its reason: `{ref.rejected}`"]
    create_markdown_artifact(key=f"{key}-summary", markdown="\n".join(lines), description=title)
    create_link_artifact(key=f"{key}-files", link=_link(ref), link_text=_link(ref), description=f"{title}: files")


@never_failing("a result")
def show_shards(shards: list[LatentShardRef]) -> None:
    """A row a latent shard: device, pictures, speed, what it was bound by."""
    rows = [
        {
            "shard": shard.index,
            "device": shard.device,
            "kept": shard.num_kept,
            "rejected": shard.num_rejected,
            "images/s": round(shard.images_per_s, 2),
            "bound by": shard.bound_by,
        }
        for shard in shards
    ]
    create_table_artifact(key="latents-shards", table=rows, description=f"{len(rows)} latent shards")


@never_failing("a page")
def show_page(path: Path, *, key: str, title: str) -> None:
    """A link to a page that was drawn."""
    create_link_artifact(key=key, link=path.resolve().as_uri(), link_text=path.name, description=title)


@never_failing("a result")
def show_buckets(ref: LatentSetRef) -> None:
    """The bucket histogram as markdown, and the mean aspect-ratio error."""
    most = max(ref.buckets.values(), default=1)
    lines = ["# Buckets", "", "| bucket (width x height) | pictures | |", "|---|---|---|"]
    lines += [f"| {name} | {count} | {'█' * round(30 * count / most)} |" for name, count in ref.buckets.items()]
    lines += ["", f"Mean aspect-ratio error {ref.mean_ar_error:.4f}."]
    create_markdown_artifact(key="latents-buckets", markdown="\n".join(lines), description="bucket histogram")


@never_failing("a result")
def show_checkpoint(ref: CheckpointRef) -> None:
    """What was trained and how to look at its curves."""
    lines = [
        "# Checkpoint",
        "",
        f"`{ref.file.path}`, {ref.file.num_bytes / 1e6:.1f} MB, SHA-256 `{ref.file.sha256}`",
        "",
        f"{ref.num_steps} steps on {ref.num_images} pictures, moving average loss {ref.final_avr_loss:.4f}.",
        "",
        f"Curves: `tensorboard --logdir {ref.tensorboard}`. Resumable state: `{ref.state}`.",
        "",
        *[f"* preview `{sample}`" for sample in ref.samples],
    ]
    create_markdown_artifact(key="train-checkpoint", markdown="\n".join(lines), description="trained checkpoint")


def _link(ref: Any) -> str:
    path: Path = ref.file.path if isinstance(ref, CheckpointRef) else ref.path
    return path.resolve().as_uri()
