"""When a state is saved, and by whom. The run goes on while a thread writes."""

from __future__ import annotations

import math
import re
import shutil
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

from sdxl_core.config import TrainConfig
from sdxl_core.training.state import Snapshot, save_snapshot


class SaveTimes:
    """After which optimizer steps a state, or a model file too, is written."""

    def __init__(self, config: TrainConfig, *, steps_per_epoch: int) -> None:
        self._config, self._steps_per_epoch = config, steps_per_epoch
        self._last_s = time.monotonic()

    def minutes_are_over(self) -> bool:
        """Has `save_every_minutes` gone by since the last state? The processes then agree."""
        every = self._config.save_every_minutes
        return bool(every) and time.monotonic() - self._last_s >= 60 * every

    def saved(self) -> None:
        """The minutes start again."""
        self._last_s = time.monotonic()

    def state_is_due(self, num_steps: int) -> bool:
        """After `num_steps` steps of the run."""
        config = self._config
        return (
            self._at(num_steps, config.save_every_steps, config.save_every_epochs) or self.model_name(num_steps) != ""
        )

    def model_name(self, num_steps: int) -> str:
        """File name of the model that is due after `num_steps` steps, as sd-scripts names them; "" where none is."""
        config, epochs = self._config, num_steps // self._steps_per_epoch
        if self._at(num_steps, 0, config.save_model_every_epochs):
            return f"{config.output_name}-{epochs:06d}.safetensors"
        if self._at(num_steps, config.save_model_every_steps, 0):
            return f"{config.output_name}-step{num_steps:08d}.safetensors"
        return ""

    def most_models(self, total: int) -> int:
        """How many model files of a run of `total` steps are there at once, the one of its end among them."""
        on_the_way = self._num_saves(total, self._config.save_model_every_steps, self._config.save_model_every_epochs)
        keep = self._config.keep_models
        return 1 + (min(on_the_way, keep + 1) if keep else on_the_way)

    def most_states(self, total: int) -> int:
        """How many states are there at once; one more than it saves by itself, for it may be asked to stop."""
        config = self._config
        if config.save_every_minutes:
            return config.keep_states + 1
        saves = self._num_saves(total, config.save_every_steps, config.save_every_epochs)
        saves += self._num_saves(total, config.save_model_every_steps, config.save_model_every_epochs)
        return min(config.keep_states + 1, saves + 2)

    def _num_saves(self, total: int, every_steps: int, every_epochs: int) -> int:
        """After how many steps before the last `_at` is true."""
        periods = [every for every in (every_steps, every_epochs * self._steps_per_epoch) if every]
        if len(periods) < 2:
            return sum((total - 1) // every for every in periods)
        one, other = periods
        return (total - 1) // one + (total - 1) // other - (total - 1) // math.lcm(one, other)

    def _at(self, num_steps: int, every_steps: int, every_epochs: int) -> bool:
        if every_steps and num_steps % every_steps == 0:
            return True
        epochs, rest = divmod(num_steps, self._steps_per_epoch)
        return bool(every_epochs) and rest == 0 and epochs % every_epochs == 0


class Saver:
    """Writes states in a thread, one after the other. What went wrong there is raised by the next call."""

    def __init__(self, folder: Path, *, keep: int, rank: int, num_ranks: int) -> None:
        self._folder, self._keep, self._rank, self._num_ranks = folder, keep, rank, num_ranks
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="saver")
        self._running: Future[None] | None = None

    def submit(self, snapshot: Snapshot, *, then: Callable[[Path], None] | None = None) -> None:
        """Write `snapshot`, whose tensors nobody changes any more; `then` gets the folder when it is whole."""
        self.wait()
        self._running = self._pool.submit(self._save, snapshot, then)

    def wait(self) -> None:
        """Until nothing is being written. Raises: what `save_snapshot` raises."""
        if self._running is not None:
            running, self._running = self._running, None
            running.result()

    def _save(self, snapshot: Snapshot, then: Callable[[Path], None] | None) -> None:
        path = save_snapshot(self._folder, snapshot, keep=self._keep, rank=self._rank, num_ranks=self._num_ranks)
        if then is not None and self._rank == 0:
            then(path)


def models_on_the_way(folder: Path, config: TrainConfig) -> list[Path]:
    """What `SaveTimes.model_name` has named in `folder`."""
    suffix = "" if config.save_model_as == "diffusers" else r"\.safetensors"
    pattern = re.compile(rf"{re.escape(config.output_name)}-(step\d{{8}}|\d{{6}}){suffix}")
    return [path for path in folder.glob("*") if pattern.fullmatch(path.name)]


def remove_old_models(folder: Path, config: TrainConfig) -> None:
    """Keep the newest `keep_models` of the model files that were written on the way."""
    if config.keep_models:
        for path in sorted(models_on_the_way(folder, config), key=lambda path: path.stat().st_mtime_ns)[
            : -config.keep_models
        ]:
            if path.is_dir():
                shutil.rmtree(path)
            else:
                path.unlink()
