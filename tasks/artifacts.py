"""What a run shows in the browser: progress, counts, histograms, links. Artifacts mirror references, nothing else."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import quote
from uuid import UUID

import orjson
from prefect import get_run_logger, runtime
from prefect.artifacts import (
    create_markdown_artifact,
    create_progress_artifact,
    create_table_artifact,
    update_progress_artifact,
)
from prefect.client.orchestration import get_client
from prefect.events import emit_event

from sdxl_core.config import CacheLatentsConfig
from sdxl_core.latents.report import contact_sheet
from sdxl_core.lineage import trace
from sdxl_core.lineage.show import lineage_markdown
from sdxl_core.refs import CheckpointRef, LatentSetRef, LatentShardRef, MemoryPlan, RunRef, to_json
from sdxl_core.rejected import count_reasons, read_rejected
from sdxl_core.report.pictures import previews_markdown, thumbnail_url
from sdxl_core.run_record import summaries
from sdxl_core.summary import counted, describe
from sdxl_core.training.checkpoints import list_checkpoints

NUM_PICTURES = 8  # on the contact sheet
MIN_SECONDS_BETWEEN_UPDATES = 10.0
MIN_SECONDS_BETWEEN_EVENTS = 60.0
_SAID = {"sizes": "headers of pictures read"}  # by stage, where it is another than the task's own
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
            self._show(_SAID.get(stage, self._description), done, total, note)

    def _show(self, what: str, done: int, total: int, note: str) -> None:
        now = time.monotonic()
        with self._lock:
            if done < total and now - self._last_update < MIN_SECONDS_BETWEEN_UPDATES:
                return
            self._last_update = now
            percent = 100.0 * done / total if total else 100.0
            self._emit(done, now)
            text = f"{what}: {done} of {total}" + (f", {note}" if note else "")
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
    numbers += [{"what": f"missing {name}", "value": count} for name, count in fields.get("missing", {}).items()]
    create_table_artifact(key=f"{key}-counts", table=numbers, description=describe(ref))
    lines = [f"# {title}", "", describe(ref), ""]
    if fields.get("num_rejected"):
        reasons = count_reasons(row for row in read_rejected(ref.rejected) if row.stage == key)
        lines += ["| rejected because | pictures |", "|---|---|"]
        lines += [f"| {reason} | {count} |" for reason, count in reasons.items()]
        lines += ["", f"Each with its reason: `{ref.rejected}`"]
    lines += ["", f"Files: `{_place(ref)}`"]
    create_markdown_artifact(key=f"{key}-summary", markdown="\n".join(lines), description=title)


@never_failing("a result")
def show_shards(shards: list[LatentShardRef], states: list[str]) -> None:
    """A row a latent shard: state, device, pictures, speed, what it was bound by."""
    rows = [
        {
            "shard": shard.index,
            "state": state,
            "device": shard.device,
            "kept": shard.num_kept,
            "rejected": shard.num_rejected,
            "images/s": round(shard.images_per_s, 2),
            "bound by": shard.bound_by,
        }
        for shard, state in zip(shards, states, strict=True)
    ]
    create_table_artifact(key="latents-shards", table=rows, description=f"{len(rows)} latent shards")


@never_failing("a page")
def show_page(path: Path, *, key: str, title: str) -> None:
    """Where a page that was drawn is: a browser follows no file:// link of a served page."""
    create_markdown_artifact(key=key, markdown=f"{title}: `{path.resolve()}`", description=title)


@never_failing("the failed shards")
def show_failed_shards(reasons: dict[int, str], *, num_shards: int) -> None:
    """Each shard that failed for good with its reason, and a link that works on these alone.

    Args: reasons: by the shard's number.   num_shards: that the run was to work on.
    """
    lines = [f"# {len(reasons)} of {num_shards} shards failed", "", "The others are finished and kept.", ""]
    lines += [f"* shard {number}: {reason}" for number, reason in reasons.items()]
    only = list(reasons) if runtime.flow_run.flow_name == "cache-latents" else []  # which has the parameter
    link = run_again_link(only)
    again = f"[start these shards again]({link})" if link else "start the same run again"
    names = f"only_shards = {','.join(str(number) for number in only)}"
    how = f"`{names}`: the others are not looked at" if only else "finished shards are answered as `Cached`"
    lines += ["", f"Mend what the reasons say, then {again} ({how})."]
    create_markdown_artifact(
        key="failed-shards", markdown="\n".join(lines), description=f"{len(reasons)} of {num_shards} shards failed"
    )


def run_again_link(only_shards: list[int]) -> str:
    """The form of the run that a person or a schedule has started, filled in as it was; "" without a deployment.

    Args: only_shards: what its parameter of this name is set to, none: it is left as it was.
    """
    with get_client(sync_client=True) as client:
        run = client.read_flow_run(UUID(str(runtime.flow_run.root_flow_run_id)))
    if run.deployment_id is None:
        return ""
    if only_shards:
        section = (
            run.parameters["config"] if "config" in run.parameters else run.parameters["job"].setdefault("latents", {})
        )
        section["only_shards"] = only_shards
    parameters = quote(quote(orjson.dumps(run.parameters).decode(), safe=""), safe="")  # twice, as Prefect's page does
    return f"/deployments/deployment/{run.deployment_id}/run?parameters={parameters}"


@never_failing("a result")
def show_buckets(ref: LatentSetRef) -> None:
    """The bucket histogram as markdown, and the mean aspect-ratio error."""
    most = max(ref.buckets.values(), default=1)
    lines = ["# Buckets", "", "| bucket (width x height) | pictures | |", "|---|---|---|"]
    lines += [f"| {name} | {count} | {'█' * round(30 * count / most)} |" for name, count in ref.buckets.items()]
    lines += ["", f"Mean aspect-ratio error {ref.mean_ar_error:.4f}."]
    create_markdown_artifact(key="latents-buckets", markdown="\n".join(lines), description="bucket histogram")


@never_failing("a result")
def show_checkpoint(ref: CheckpointRef, *, curves: str) -> None:
    """What was trained, model files with size and digest, previews.   curves: how to look at them, as Markdown."""
    lines = [
        "# Checkpoint",
        "",
        f"`{ref.file.path.resolve()}`: {counted(ref.num_steps, 'step')} on {counted(ref.num_images, 'picture')}, "
        f"moving average loss {ref.final_avr_loss:.4f}.",
        "",
        f"Curves: {curves}. Resumable state: `{ref.state.resolve()}`.",
        "",
        "| model file | MB | SHA-256 |",
        "|---|---|---|",
    ]
    files = list_checkpoints(ref.file.path.parent, ref.state) if ref.file.path.is_file() else [ref.file]
    lines += [f"| `{file.path.name}` | {file.num_bytes / 1e6:.1f} | `{file.sha256}` |" for file in files]
    lines += ["", "## Previews", "", *previews_markdown(ref.samples)] if ref.samples else []
    create_markdown_artifact(key="train-checkpoint", markdown="\n".join(lines), description="trained checkpoint")


@never_failing("the memory plan")
def show_memory(plan: MemoryPlan) -> None:
    """A row a component; a row with the sum of each place."""
    rows: list[dict[str, Any]] = []
    for where, parts in (("each card", plan.card), ("main memory, each process", plan.host), ("disk", plan.disk)):
        named = {name: size for name, size in parts.items() if size} | {"together": sum(parts.values())}
        rows += [{"where": where, "what": name, "GiB": round(n / 2**30, 3), "bytes": n} for name, n in named.items()]
    trained = f"{plan.num_trained:,} of {plan.num_parameters:,} parameters train"
    text = f"{plan.card_bytes / 2**30:.2f} GiB of each card; {trained}"
    create_table_artifact(key="memory-plan", table=rows, description=text)


@never_failing("a result")
def show_run(ref: RunRef, *, latents: CacheLatentsConfig) -> None:
    """The report and the lineage. A browser opens no file:// link of a served page: what matters is in the artifact."""
    sheet = thumbnail_url(contact_sheet(latents, num_pictures=NUM_PICTURES), max_side_px=1100)
    lines = ["# The whole run", "", *[f"* {summary}" for summary in summaries(ref.path)], ""]
    lines += [f"![pictures beside their latents]({sheet})", "", "Left the picture, right its latents as cached.", ""]
    lines += [f"Report with all charts: `{ref.report}`"]
    create_markdown_artifact(key="run-report", markdown="\n".join(lines), description="the whole run")
    if ref.lineage is not None:
        text = lineage_markdown(trace(ref.checkpoint, run=ref.path.parent))
        create_markdown_artifact(
            key="run-lineage", markdown=f"{text}\n\nAs a page: `{ref.lineage}`", description="from query to checkpoint"
        )


def _place(ref: Any) -> Path:
    path: Path = ref.file.path if isinstance(ref, CheckpointRef) else ref.path
    return path.resolve()
