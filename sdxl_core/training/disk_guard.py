"""Whether the disk can hold what a run will write, from shapes alone: nothing is loaded and no process started."""

from __future__ import annotations

import shutil
from pathlib import Path

from sdxl_core.config import TrainConfig
from sdxl_core.errors import DiskFullError
from sdxl_core.models.load import preset_of
from sdxl_core.training.memory_plan import disk_needs, most_disk_needs
from sdxl_core.training.saving import SaveTimes, models_on_the_way
from sdxl_core.training.schedules import total_steps
from sdxl_core.training.text_outputs import outputs_bytes
from sdxl_core.training.training_set import TrainingSet


def check_disk(config: TrainConfig, training_set: TrainingSet) -> None:
    """Refuse to begin where the disk cannot hold all that the run will write into `out`, which is there.

    A new state, or model on the way, is whole before the oldest goes, so one more than are kept is there for a moment.
    Raises: DiskFullError.
    """
    folder, preset = config.out, preset_of(config.base_model)
    steps_per_epoch = training_set.plan(config).num_steps
    total, times = (
        total_steps(config, steps_per_epoch=steps_per_epoch),
        SaveTimes(config, steps_per_epoch=steps_per_epoch),
    )
    num_states, num_models = times.most_states(total), times.most_models(total)
    free, there = shutil.disk_usage(folder).free, sum(map(_size, _own_files(config)))
    for sizes in (most_disk_needs, disk_needs):  # the second takes seconds, and is asked if the first do not fit
        state_bytes, model_bytes = sizes(config, preset)
        needed = num_states * state_bytes + num_models * model_bytes
        texts = outputs_bytes(config, training_set, preset, free=free + there - needed)
        needed += texts
        if free + there >= needed:
            return
    average = "" if config.ema_decay is None else ", the averaged weights of ema_decay among it"
    outputs = f", and outputs of text encoders of {_bytes(texts)} (cache_text_encoder_outputs)" if texts else ""
    raise DiskFullError(
        f"{folder}: this run needs {_bytes(needed)} on the disk: {num_states} resumable states of "
        f"{_bytes(state_bytes)}{average} (keep_states = {config.keep_states}; a new one is whole before one goes), and "
        f"{num_models} model file{'s' * (num_models > 1)} of {_bytes(model_bytes)} "
        f"(keep_models = {config.keep_models or 'all'}){outputs}. {_bytes(free)} are free, {_bytes(there)} are this "
        f"run's already. Free {_bytes(needed - free - there)}, keep fewer (keep_models, save_model_every_epochs, "
        f"save_model_every_steps), or choose an out folder on another disk."
    )


def _bytes(count: int) -> str:
    return f"{count:,} bytes ({count / 1e9:.1f} GB)"


def _own_files(config: TrainConfig) -> list[Path]:
    """States, half-written ones too, and models that are there and are kept or replaced."""
    state, model = config.out / "state", config.out / "model"
    last = model / config.output_name
    found = [*state.glob("step-*"), *state.glob(".step-*.partial"), *models_on_the_way(model, config)]
    found += config.out.glob("text_outputs/*")
    return [*found, *(path for path in (last, last.with_name(f"{last.name}.safetensors")) if path.exists())]


def _size(path: Path) -> int:
    files = path.rglob("*") if path.is_dir() else [path]
    return sum(file.stat().st_size for file in files if file.is_file())
