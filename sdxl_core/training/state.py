"""What a run continues from: generations `state/step-00000030/`, each whole or not there, two of them kept.

    step-00000030/weights.safetensors     the trained parameters, in the dtype they are trained in
                  optimizer.safetensors   the optimizer's states
                  losses.safetensors      the window of the moving average
                  manifest.json           step, settings, scalars, sha256 of each file; written last

Order, noise and captions are functions of the step, so nothing else is needed.
"""

from __future__ import annotations

import logging
import os
import re
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import orjson
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from sdxl_core.errors import CheckpointError, ConfigError
from sdxl_core.files import disk_errors, sha256_file, sync_files, sync_folder, write_atomic

FORMAT = 1
KEPT_GENERATIONS = 2
MANIFEST = "manifest.json"
logger = logging.getLogger(__name__)

TensorFiles = Mapping[str, Mapping[str, Tensor]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Snapshot:
    """A run after optimizer step `step`. `tensors`: by file name and tensor name; `settings`: what shaped the run;

    `scalars`: JSON values.
    """

    step: int
    settings: dict[str, Any]
    scalars: dict[str, Any]
    tensors: TensorFiles


def save_snapshot(folder: Path, snapshot: Snapshot) -> Path:
    """Write a generation beside the others, give it its name, then delete all but the newest two.

    Raises: DiskFullError, DataError (no permission); older generations are untouched then.
    """
    final = folder / f"step-{snapshot.step:08d}"
    partial = folder / f".{final.name}.partial"
    with disk_errors(folder):
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        try:
            _write_generation(partial, snapshot)
            shutil.rmtree(final, ignore_errors=True)
            os.replace(partial, final)
        finally:
            shutil.rmtree(partial, ignore_errors=True)
        sync_folder(folder)
    for old in _generations(folder)[KEPT_GENERATIONS:]:
        shutil.rmtree(old, ignore_errors=True)
    return final


def _write_generation(partial: Path, snapshot: Snapshot) -> None:
    files = {}
    for name, tensors in snapshot.tensors.items():
        path = partial / f"{name}.safetensors"
        try:
            save_file({key: value.detach().cpu().contiguous() for key, value in tensors.items()}, path)
        except SafetensorError as error:  # its only way to say "No space left on device"
            raise _as_os_error(error) from error
        sync_files([path])
        files[path.name] = {"sha256": sha256_file(path), "num_bytes": path.stat().st_size}
    manifest = {
        "format": FORMAT,
        "step": snapshot.step,
        "settings": snapshot.settings,
        "scalars": snapshot.scalars,
        "files": files,
    }
    write_atomic(partial / MANIFEST, orjson.dumps(manifest, option=orjson.OPT_INDENT_2))


def _as_os_error(error: SafetensorError) -> Exception:
    code = re.search(r"os error (\d+)", str(error))
    return OSError(int(code.group(1)), os.strerror(int(code.group(1)))) if code else error


def load_newest(folder: Path, *, settings: dict[str, Any]) -> Snapshot | None:
    """The newest generation that is whole, or None where there is none at all. Tensors are on the CPU.

    A damaged one is skipped with a warning, its predecessor is used.
    Raises: ConfigError: the state is of a run with other settings.   CheckpointError: every generation is damaged.
    """
    generations = _generations(folder)
    for path in generations:
        try:
            return _read_generation(path, settings)
        except CheckpointError as error:
            logger.warning("%s Falling back to the generation before it.", error)
    if generations:
        raise CheckpointError(
            f"{folder}: all {len(generations)} saved states are damaged. Delete the folder to start again at step 0."
        )
    return None


def _read_generation(path: Path, settings: dict[str, Any]) -> Snapshot:
    try:
        manifest = orjson.loads((path / MANIFEST).read_bytes())
        step, files, scalars = int(manifest["step"]), manifest["files"], manifest["scalars"]
        saved_settings = manifest["settings"]
    except (OSError, orjson.JSONDecodeError, KeyError, TypeError, ValueError) as error:
        raise CheckpointError(f"{path / MANIFEST}: unreadable ({error}).") from error
    check_settings(path, saved_settings, settings)
    tensors = {}
    for name, expected in files.items():
        file = path / name
        if not file.exists() or sha256_file(file) != expected["sha256"]:
            raise CheckpointError(f"{file}: is missing or not what was written (sha256 differs).")
        tensors[file.stem] = load_file(file)
    return Snapshot(step=step, settings=saved_settings, scalars=scalars, tensors=tensors)


def check_settings(path: Path, saved: dict[str, Any], asked: dict[str, Any]) -> None:
    """Refuse to continue a run under other settings.

    Raises: ConfigError: names every field that differs, with both values.
    """
    differing = [name for name in {**saved, **asked} if saved.get(name) != asked.get(name)]
    if differing:
        listed = ", ".join(f"{name} ({saved.get(name)!r} there, {asked.get(name)!r} now)" for name in differing)
        raise ConfigError(
            f"{path} was trained with other settings: {listed}. Change them back to continue that run, or choose "
            f"another out folder for a new one. max_train_steps may be raised."
        )


def _generations(folder: Path) -> list[Path]:
    return sorted((path for path in folder.glob("step-*") if path.is_dir()), reverse=True)
