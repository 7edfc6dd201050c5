"""What a run shows of itself: TensorBoard scalars, the progress file, a line in the log now and then."""

from __future__ import annotations

import contextlib
import logging
import time
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal, get_args

import orjson
import torch
from accelerate import Accelerator

from sdxl_core.config import TrainConfig
from sdxl_core.files import write_atomic
from sdxl_core.training.processes import ProgressFile

Stage = Literal["data", "forward", "backward", "sync", "optimizer", "save"]
LOG_EVERY_S = 10.0
logger = logging.getLogger(__name__)


class Stopwatch:
    """Seconds by stage within one step; on a card by its own clock, which nothing waits for."""

    def __init__(self, device: torch.device) -> None:
        self._on_card = device.type == "cuda"
        self._seconds = dict.fromkeys(get_args(Stage), 0.0)
        self._events: list[tuple[Stage, torch.cuda.Event, torch.cuda.Event]] = []

    @contextlib.contextmanager
    def __call__(self, stage: Stage) -> Iterator[None]:
        if self._on_card and stage not in ("data", "save"):
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
            start.record()
            yield
            end.record()
            self._events.append((stage, start, end))
        else:
            start_s = time.perf_counter()
            yield
            self._seconds[stage] += time.perf_counter() - start_s

    def take(self) -> dict[Stage, float]:
        """Seconds since the last call, by stage. The card must have finished them."""
        if self._events:
            self._events[-1][2].synchronize()
        for stage, start, end in self._events:
            self._seconds[stage] += start.elapsed_time(end) / 1000
        taken, self._seconds, self._events = self._seconds, dict.fromkeys(self._seconds, 0.0), []
        return taken


def memory_gb(device: torch.device) -> float:
    """The most memory this process has held so far: of the card, or of the machine where it computes there."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e9
    import resource  # not on Windows

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9


class Watch:
    """Where the scalars of a run go."""

    def __init__(self, config: TrainConfig, accelerator: Accelerator, *, settings: dict[str, Any], total: int) -> None:
        self._config, self._accelerator, self._settings, self._total = config, accelerator, settings, total
        self._state = config.out / "state"
        self._progress = ProgressFile(self._state)
        self._last_line_s = float("-inf")

    def start(self, step: int) -> None:
        """Open the TensorBoard run: the one this run had before, cut after the step we continue from."""
        name = f"{self._config.log_prefix}{datetime.now(UTC):%Y%m%d%H%M%S}"
        record = self._state / "run.json"
        if record.exists():
            known: dict[str, Any] = orjson.loads(record.read_bytes())
            if known["settings"] == self._settings:
                name = known["tensorboard"]
        if self._accelerator.is_main_process:
            write_atomic(record, orjson.dumps({"tensorboard": name, "settings": self._settings}))
        self._accelerator.init_trackers(name, init_kwargs={"tensorboard": {"purge_step": step + 1}})

    def tensorboard(self) -> Path:
        """Folder of the TensorBoard run."""
        name: str = orjson.loads((self._state / "run.json").read_bytes())["tensorboard"]
        return self._config.out / "tensorboard" / name

    def report(self, num_steps: int, scalars: dict[str, float]) -> None:
        """The scalars after `num_steps` steps; loss, avr_loss, grad_norm and images_per_s are among them."""
        self._accelerator.log(scalars, step=num_steps)
        if not self._accelerator.is_main_process:
            return
        loss, avr_loss, images_per_s = (scalars[name] for name in ("loss", "avr_loss", "images_per_s"))
        self._progress.write(step=num_steps, total=self._total, loss=loss, avr_loss=avr_loss, images_per_s=images_per_s)
        if time.monotonic() - self._last_line_s >= LOG_EVERY_S or num_steps == self._total:
            self._last_line_s = time.monotonic()
            logger.info(
                "step %d/%d loss %.4f avr_loss %.4f grad_norm %.3g %.2f images/s",
                num_steps, self._total, loss, avr_loss, scalars["grad_norm"], images_per_s,
            )  # fmt: skip
