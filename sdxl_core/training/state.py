"""What a run continues from: generations `state/step-00000030/`, each whole or not there, two of them kept at least.

    step-00000030/weights.safetensors     the trained parameters, in the dtype they are trained in
                  optimizer.safetensors   the optimizer's states
                  ema.safetensors         the averaged weights, where there are such
                  losses.safetensors      the window of the moving average
                  manifest.json           step, settings, scalars, sha256 of each file and of all this; written last

Where weights are divided among processes (FSDP2), each writes its own `weights.1-of-4.safetensors`, and the manifest
says which elements of a weight it holds. Order, noise and captions are functions of the step: nothing else is needed.
"""

from __future__ import annotations

import logging
import os
import re
import shutil
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import orjson
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from sdxl_core.errors import CheckpointError, ConfigError
from sdxl_core.files import digest_of, disk_errors, sha256_file, sync_files, sync_folder, write_atomic
from sdxl_core.training.parallel import Piece

FORMAT, UNDIGESTED_FORMAT = 3, 2  # states of version 0.1 have no digest of their manifest
KEPT_GENERATIONS = 2
MANIFEST = "manifest.json"
WAIT_S = 3600.0  # for the other processes' files: they are gone if it takes longer
logger = logging.getLogger(__name__)

TensorFiles = Mapping[str, Mapping[str, Tensor]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Snapshot:
    """A run after optimizer step `step`, what one process holds of it. `settings`: what shaped the run.

    scalars: JSON values.   tensors: by file name and tensor name.   pieces: which part of a parameter its tensors are,
    by parameter; all of it where it is not named.
    """

    step: int
    settings: dict[str, Any]
    scalars: dict[str, Any]
    tensors: TensorFiles
    pieces: Mapping[str, Piece] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class Generation:
    """A saved run. `parts`: what each process wrote, in their order; one where nothing was divided."""

    path: Path
    step: int
    settings: dict[str, Any]
    parts: tuple[Snapshot, ...]

    @property
    def scalars(self) -> dict[str, Any]:
        return self.parts[0].scalars

    @property
    def tensors(self) -> TensorFiles:
        return self.parts[0].tensors


def save_snapshot(
    folder: Path, snapshot: Snapshot, *, keep: int = KEPT_GENERATIONS, rank: int = 0, num_ranks: int = 1
) -> Path:
    """Write a generation beside the others, give it its name, then delete all but the newest `keep` up to it.

    A later one is damaged, or it would have been continued: it does not count, and goes when the run has passed it.
    Of several processes each calls this; the first waits for the others' files and does the rest.
    Raises: DiskFullError, DataError (no permission); older generations are untouched then.
    """
    final = folder / f"step-{snapshot.step:08d}"
    partial = folder / f".{final.name}.partial"
    with disk_errors(folder):
        if num_ranks == 1:
            shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True, exist_ok=True)
        try:
            record = _write_part(partial, snapshot, "" if num_ranks == 1 else f".{rank}-of-{num_ranks}")
            if rank:
                write_atomic(partial / f"part-{rank}.json", orjson.dumps(record))
                return final
            records = [record, *(_wait_for(partial / f"part-{other}.json") for other in range(1, num_ranks))]
            manifest = {"format": FORMAT, "step": snapshot.step, "settings": snapshot.settings, "parts": records}
            manifest["sha256"] = _manifest_digest(manifest)
            write_atomic(partial / MANIFEST, orjson.dumps(manifest, option=orjson.OPT_INDENT_2))
            shutil.rmtree(final, ignore_errors=True)
            os.replace(partial, final)
        finally:
            if num_ranks == 1:
                shutil.rmtree(partial, ignore_errors=True)
        sync_folder(folder)
    for old in [path for path in _generations(folder) if path.name <= final.name][keep:]:
        shutil.rmtree(old, ignore_errors=True)
    return final


def remove_partials(folder: Path) -> None:
    """Remove what a killed run left half written. Only while nothing is saved."""
    for partial in folder.glob(".step-*.partial"):
        shutil.rmtree(partial, ignore_errors=True)


def _write_part(partial: Path, snapshot: Snapshot, suffix: str) -> dict[str, Any]:
    files = {}
    for name, tensors in snapshot.tensors.items():
        path = partial / f"{name}{suffix}.safetensors"
        try:
            save_file({key: value.detach().cpu().contiguous() for key, value in tensors.items()}, path)
        except SafetensorError as error:  # its only way to say "No space left on device"
            raise _as_os_error(error) from error
        sync_files([path])
        files[name] = {"file": path.name, "sha256": sha256_file(path), "num_bytes": path.stat().st_size}
    pieces = {name: [piece.offset, piece.count, piece.total] for name, piece in snapshot.pieces.items()}
    return {"files": files, "scalars": snapshot.scalars, "pieces": pieces}


def _wait_for(path: Path) -> dict[str, Any]:
    deadline_s = time.monotonic() + WAIT_S
    while not path.exists():
        if time.monotonic() > deadline_s:
            raise CheckpointError(f"{path}: another training process did not write its part of the state.")
        time.sleep(0.02)
    record: dict[str, Any] = orjson.loads(path.read_bytes())
    path.unlink()
    return record


def _as_os_error(error: SafetensorError) -> Exception:
    code = re.search(r"os error (\d+)", str(error))
    return OSError(int(code.group(1)), os.strerror(int(code.group(1)))) if code else error


def load_newest(
    folder: Path, *, settings: dict[str, Any], formerly: Mapping[str, Any] | None = None
) -> Generation | None:
    """The newest generation that is whole, or None where there is none at all. Tensors are on the CPU, mapped.

    A damaged one is skipped with a warning, its predecessor is used. `formerly`: as `check_settings`.
    Raises: ConfigError: the state is of a run with other settings.   CheckpointError: every generation is damaged.
    """
    generations = _generations(folder)
    for path in generations:
        try:
            return read_generation(path, settings=settings, formerly=formerly)
        except CheckpointError as error:
            logger.warning("%s Falling back to the generation before it.", error)
    if generations:
        raise CheckpointError(
            f"{folder}: all {len(generations)} saved states are damaged. Delete the folder to start again at step 0."
        )
    return None


def read_generation(
    path: Path,
    *,
    settings: dict[str, Any] | None = None,
    formerly: Mapping[str, Any] | None = None,
    verify: bool = True,
) -> Generation:
    """One generation. `settings`: of the run that continues it, None where nobody does; `verify`: every byte.

    Raises: CheckpointError: it is damaged.   ConfigError: it is of a run with other settings.
    """
    manifest = read_manifest(path)
    try:
        step, saved_settings = int(manifest["step"]), manifest["settings"]
        parts = [(part["files"], part["scalars"], part["pieces"]) for part in manifest["parts"]]
    except (KeyError, TypeError, ValueError) as error:
        raise CheckpointError(f"{path / MANIFEST}: unreadable ({error!r}).") from error
    if settings is not None:
        check_settings(path, saved_settings, settings, formerly)
    read = tuple(
        Snapshot(
            step=step,
            settings=saved_settings,
            scalars=scalars,
            tensors={name: _read_file(path, expected, verify=verify) for name, expected in files.items()},
            pieces={name: Piece(offset=o, count=count, total=total) for name, (o, count, total) in pieces.items()},
        )
        for files, scalars, pieces in parts
    )
    return Generation(path=path, step=step, settings=saved_settings, parts=read)


def read_manifest(path: Path) -> dict[str, Any]:
    """What the manifest of the generation `path` says, checked against its own digest. Raises: CheckpointError."""
    try:
        manifest: dict[str, Any] = orjson.loads((path / MANIFEST).read_bytes())
        told = manifest.pop("sha256", None)
        is_old = told is None and manifest["format"] == UNDIGESTED_FORMAT
        is_whole = is_old or told == _manifest_digest(manifest)
    except (OSError, orjson.JSONDecodeError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{path / MANIFEST}: unreadable ({error!r}).") from error
    if not is_whole:
        raise CheckpointError(f"{path / MANIFEST}: is not what was written (sha256 differs).")
    return manifest


def newest_manifest(folder: Path) -> dict[str, Any] | None:
    """The manifest of the newest generation whose manifest is whole; None where there is none. Reads no tensor."""
    for path in _generations(folder):
        try:
            return read_manifest(path)
        except CheckpointError:  # told by `load_newest`
            continue
    return None


def _manifest_digest(manifest: dict[str, Any]) -> str:
    return digest_of(orjson.dumps(manifest, option=orjson.OPT_SORT_KEYS))


def _read_file(path: Path, expected: dict[str, Any], *, verify: bool) -> dict[str, Tensor]:
    file = path / expected["file"]
    if not file.exists() or (verify and sha256_file(file) != expected["sha256"]):
        raise CheckpointError(f"{file}: is missing or not what was written (sha256 differs).")
    tensors: dict[str, Tensor] = load_file(file)
    return tensors


def check_settings(
    path: Path, saved: dict[str, Any], asked: dict[str, Any], formerly: Mapping[str, Any] | None = None
) -> None:
    """Refuse to continue a run under other settings. `formerly`: how older versions wrote down what is asked.

    Raises: ConfigError: names every field that differs, with both values.
    """
    known = {name for name, value in (formerly or {}).items() if saved.get(name) == value}
    differing = [name for name in {**saved, **asked} if saved.get(name) != asked.get(name) and name not in known]
    if not differing:
        return
    listed = ", ".join(f"{name} ({saved.get(name)!r} there, {asked.get(name)!r} now)" for name in differing)
    hint = ""
    if "global_batch_size" in differing:
        hint = (
            f" The processes together must see {saved.get('global_batch_size')} pictures a micro-batch, as before: "
            f"num_processes times train_batch_size."
        )
    raise ConfigError(
        f"{path} was trained with other settings: {listed}. Change them back to continue that run, or choose "
        f"another out folder for a new one. max_train_steps may be raised.{hint}"
    )


def _generations(folder: Path) -> list[Path]:
    return sorted((path for path in folder.glob("step-*") if path.is_dir()), reverse=True)
