"""What a run continues from: generations `state/step-00000030/`, each whole or not there, two of them kept at least.

    settings-0123456789abcdef.json        settings, config, digests: once for all states; named by its sha256
    losses.f64                            the loss of every step (loss_average.py)
    step-00000030/weights.safetensors     the trained parameters, in the dtype they are trained in
                  optimizer.safetensors   the optimizer's states, its plain numbers in the header
                  ema.safetensors         the averaged weights, where there are such
                  manifest.json           below 1 kB: what cannot be computed, digests of the files; written last

Where weights are divided among processes (FSDP2), each writes its own `weights.1-of-4.safetensors`, whose header says
which elements of a weight it holds. Order, noise and captions are functions of the step: nothing else is needed.
"""

from __future__ import annotations

import hashlib
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
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from sdxl_core.errors import CheckpointError, ConfigError
from sdxl_core.files import digest_of, disk_errors, sha256_file, sync_files, sync_folder, write_atomic
from sdxl_core.training.parallel import Piece

FORMAT, WHOLE_FORMAT, UNDIGESTED_FORMAT = 4, 3, 2  # the older two hold all about their run; 2 without a digest
KEPT_GENERATIONS = 2
MANIFEST, LOSSES = "manifest.json", "losses.f64"
DIGITS = 16  # of a sha256, against accidents: 8 processes' files still fit in 1 kB
WAIT_S = 3600.0  # for the other processes' files: they are gone if it takes longer
logger = logging.getLogger(__name__)

TensorFiles = Mapping[str, Mapping[str, Tensor]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Snapshot:
    """A run after optimizer step `step`, what one process holds of it.

    run: JSON values, the same in every state of a run; `settings` among them: what shaped it.   scalars: JSON values
    that cannot be computed.   tensors: by file name and tensor name.   numbers: states of the optimizer that are no
    tensors, by parameter.   pieces: which part of a parameter its tensors are; all of it where it is not named.
    """

    step: int
    run: Mapping[str, Any]
    scalars: Mapping[str, Any]
    tensors: TensorFiles
    numbers: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    pieces: Mapping[str, Piece] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class Generation:
    """A saved run. `parts`: what each process wrote, in their order; one where nothing was divided."""

    path: Path
    step: int
    run: Mapping[str, Any]
    parts: tuple[Snapshot, ...]

    @property
    def scalars(self) -> Mapping[str, Any]:
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
            digests = _write_part(partial, snapshot, _suffix(rank, num_ranks))
            if rank:
                write_atomic(partial / f"part-{rank}.json", orjson.dumps(digests))
                return final
            parts = [digests, *(_wait_for(partial / f"part-{other}.json") for other in range(1, num_ranks))]
            sync_files(path for path in (folder / LOSSES,) if path.exists())
            manifest = {"format": FORMAT, "step": snapshot.step, "run": _write_run(folder, snapshot.run)}
            manifest |= {
                "scalars": snapshot.scalars,
                "files": {name: [part[name] for part in parts] for name in digests},
            }
            manifest["sha256"] = _manifest_digest(manifest)
            write_atomic(partial / MANIFEST, orjson.dumps(manifest))
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


def _write_part(partial: Path, snapshot: Snapshot, suffix: str) -> dict[str, str]:
    """What this process holds. Returns each file's digest by its name."""
    pieces = {name: [piece.offset, piece.count, piece.total] for name, piece in snapshot.pieces.items()}
    headers = {"weights": {"pieces": _json(pieces)}, "optimizer": {"numbers": _json(snapshot.numbers)}}
    digests = {}
    for name, tensors in snapshot.tensors.items():
        path = partial / f"{name}{suffix}.safetensors"
        held = {key: value.detach().cpu().contiguous() for key, value in tensors.items()}
        try:
            save_file(held, path, metadata=headers.get(name))
        except SafetensorError as error:  # its only way to say "No space left on device"
            raise _as_os_error(error) from error
        sync_files([path])
        digests[name] = sha256_file(path)[:DIGITS]
    return digests


def _suffix(rank: int, num_ranks: int) -> str:
    return "" if num_ranks == 1 else f".{rank}-of-{num_ranks}"


def _json(value: Any) -> str:
    return orjson.dumps(value).decode()


def _write_run(folder: Path, run: Mapping[str, Any]) -> str:
    """Write what is the same in every state of a run, where it is not there. Returns its digest, which names it."""
    data = orjson.dumps(run, option=orjson.OPT_INDENT_2 | orjson.OPT_SORT_KEYS)
    digest = hashlib.sha256(data).hexdigest()[:DIGITS]
    path = folder / f"settings-{digest}.json"
    if not path.exists() or path.read_bytes() != data:
        write_atomic(path, data)
    return digest


def _read_run(path: Path, manifest: dict[str, Any]) -> dict[str, Any]:
    """What the state `path` says is the same in every state of its run. Raises: CheckpointError: missing, damaged."""
    if manifest["format"] < FORMAT:
        return {**manifest["parts"][0]["scalars"], "settings": manifest["settings"]}
    record = path.parent / f"settings-{manifest['run']}.json"
    try:
        data = record.read_bytes()
    except OSError as error:
        raise CheckpointError(
            f"{path}: {record.name}, which belongs to it, cannot be read ({error.strerror}). States are moved and "
            f"copied together with that file: put it back into {path.parent}."
        ) from error
    if hashlib.sha256(data).hexdigest()[:DIGITS] != manifest["run"]:
        raise CheckpointError(f"{path}: {record.name}, which belongs to it, is not what was written (sha256 differs).")
    run: dict[str, Any] = orjson.loads(data)
    return run


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
    faults = []
    for path in generations:
        try:
            return read_generation(path, settings=settings, formerly=formerly)
        except CheckpointError as error:
            faults.append(str(error))
            logger.warning("%s Falling back to the generation before it.", error)
    if faults:
        raise CheckpointError(
            f"{folder}: none of the {len(faults)} saved states can be used. The newest: {faults[0]} Delete the folder "
            f"to start again at step 0."
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
        run = _read_run(path, manifest)
        if settings is not None:
            check_settings(path, run["settings"], settings, formerly)
        read = _read_former_part if manifest["format"] < FORMAT else _read_part
        num_ranks = len(manifest["parts"] if manifest["format"] < FORMAT else manifest["files"]["weights"])
        parts = tuple(read(path, manifest, run, rank, verify=verify) for rank in range(num_ranks))
        return Generation(path=path, step=int(manifest["step"]), run=run, parts=parts)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise CheckpointError(f"{path / MANIFEST}: unreadable ({error!r}).") from error


def _read_part(path: Path, manifest: dict[str, Any], run: dict[str, Any], rank: int, *, verify: bool) -> Snapshot:
    """What process `rank` wrote."""
    tensors: dict[str, dict[str, Tensor]] = {}
    headers: dict[str, Any] = {}
    for name, digests in manifest["files"].items():
        file = path / f"{name}{_suffix(rank, len(digests))}.safetensors"
        tensors[name], header = _read_file(file, digests[rank], verify=verify)
        headers |= {key: orjson.loads(text) for key, text in header.items()}
    return Snapshot(
        step=int(manifest["step"]),
        run=run,
        scalars=manifest["scalars"],
        tensors=tensors,
        numbers=headers["numbers"],
        pieces=_pieces(headers["pieces"]),
    )


def _read_former_part(
    path: Path, manifest: dict[str, Any], run: dict[str, Any], rank: int, *, verify: bool
) -> Snapshot:
    """As `_read_part`, of a state that holds all this in its manifest."""
    part = manifest["parts"][rank]
    files = part["files"].items()
    return Snapshot(
        step=int(manifest["step"]),
        run=run,
        scalars=part["scalars"],
        tensors={name: _read_file(path / told["file"], told["sha256"], verify=verify)[0] for name, told in files},
        numbers=part["scalars"]["optimizer"],
        pieces=_pieces(part["pieces"]),
    )


def _pieces(told: Mapping[str, tuple[int, int, int]]) -> dict[str, Piece]:
    return {name: Piece(offset=offset, count=count, total=total) for name, (offset, count, total) in told.items()}


def read_manifest(path: Path) -> dict[str, Any]:
    """What the manifest of the generation `path` says, checked against its own digest. Raises: CheckpointError."""
    try:
        manifest: dict[str, Any] = orjson.loads((path / MANIFEST).read_bytes())
        told = manifest.pop("sha256", None)
        form = manifest["format"]
        is_whole = told == _manifest_digest(manifest) or (told is None and form == UNDIGESTED_FORMAT)
    except (OSError, orjson.JSONDecodeError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{path / MANIFEST}: unreadable ({error!r}).") from error
    if not is_whole:
        raise CheckpointError(f"{path / MANIFEST}: is not what was written (sha256 differs).")
    if form not in (UNDIGESTED_FORMAT, WHOLE_FORMAT, FORMAT):
        raise CheckpointError(f"{path}: is of another version of sdxl-flows (format {form}, not {FORMAT}). Use that.")
    return manifest


def newest_run(folder: Path) -> tuple[int, dict[str, Any]] | None:
    """Step and run of the newest generation that says them whole; None where there is none. Reads no tensor."""
    for path in _generations(folder):
        try:
            manifest = read_manifest(path)
            return int(manifest["step"]), _read_run(path, manifest)
        except CheckpointError:  # told by `load_newest`
            continue
    return None


def _manifest_digest(manifest: dict[str, Any]) -> str:
    return digest_of(orjson.dumps(manifest, option=orjson.OPT_SORT_KEYS))


def _read_file(file: Path, digest: str, *, verify: bool) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors, mapped, and what the header says besides."""
    if not file.exists() or (verify and sha256_file(file)[: len(digest)] != digest):
        raise CheckpointError(f"{file}: is missing or not what was written (sha256 differs).")
    with safe_open(file, "pt") as held:
        return {name: held.get_tensor(name) for name in held.keys()}, held.metadata() or {}  # noqa: SIM118


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
