"""Reading a checkpoint's making back, and checking it against the run's folder: no database, no server."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import orjson
from safetensors import SafetensorError, safe_open

from sdxl_core.dataset.metadata import read_metadata
from sdxl_core.errors import CheckpointError, ConfigError, DataError
from sdxl_core.files import sha256_file
from sdxl_core.lineage.record import KEY
from sdxl_core.run_record import read_run_record

ORDER = ("catalog", "subset", "merge-tags", "cache-latents", "train")


@dataclass(frozen=True, slots=True, kw_only=True)
class Check:
    """One thing that was compared. `state`: same, changed or gone."""

    what: str
    path: Path
    state: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Lineage:
    """How a checkpoint came to be.

    `stages`: by name, as run.json has them (`summary`, `config`, `result`, `versions`, `finished`), in order.
    `run`: the run's folder where it was found.   `metadata`: its meta_lat.json if it is what was trained on.
    """

    file: Path
    sha256: str
    title: str
    num_steps: int
    config: dict[str, Any]
    dataset_digest: str
    code: dict[str, Any]
    versions: dict[str, str]
    stages: dict[str, dict[str, Any]]
    run: Path | None
    metadata: Path | None
    checks: tuple[Check, ...]

    @property
    def query(self) -> str:
        """The tag query that picked the pictures, "" for all."""
        query: str = self.stages.get("subset", {}).get("config", {}).get("query", "")
        return query

    def images(self) -> Iterator[dict[str, Any]]:
        """Every picture that was trained on: key, and caption, tags and train_resolution as it was trained with.

        Raises: DataError: the run's folder, or its meta_lat.json as it was, is not at hand.
        """
        if self.metadata is None:
            raise DataError(
                f"{self.file}: which pictures it was trained on stands in the meta_lat.json of its run, and that file "
                f"is not at hand as it was. Name the run's folder with --run."
            )
        for key, entry in read_metadata(self.metadata).items():
            yield {"key": key, **entry}

    def tag_counts(self) -> Counter[str]:
        """Pictures by tag, as the tags stand in meta_lat.json."""
        counts: Counter[str] = Counter()
        for image in self.images():
            counts.update({tag for part in image.get("tags", "").split(",") if (tag := part.strip())})
        return counts


def trace(file: Path, *, run: Path | None = None) -> Lineage:
    """Follow a checkpoint back: a .safetensors file, or a diffusers folder, whose digest is that of its weights.

    Args:   run: the run's folder; left out: where the file is in it, else where it was when the file was made.
    Raises: ConfigError: no such file or folder.   CheckpointError: not a model that sdxl-flows has made.
    """
    told = _told_by(file)
    record: dict[str, Any] = orjson.loads(told[KEY])
    folder = _run_folder(file, record, run)
    sha256 = _digest(file)
    stages = dict(record["stages"])
    checks: list[Check] = []
    metadata: Path | None = None
    if folder is not None:
        stages |= {name: stage for name, stage in _stages_of(folder).items() if name == "train" and stage}
        there = folder / "meta_lat.json"  # of a job; a plain training may have read it from elsewhere
        path = there if there.is_file() else Path(record["metadata"]["path"])
        metadata_check = _compared("what it was trained on", path, record["metadata"]["sha256"])
        metadata = metadata_check.path if metadata_check.state == "same" else None
        checks.append(metadata_check)
        checks += _merged(folder, stages)
        checks += _this_file(file, sha256, stages)
    return Lineage(
        file=file,
        sha256=sha256,
        title=told.get("modelspec.title", file.stem),
        num_steps=int(told["sdxl_flows.steps"]),
        config=orjson.loads(told["sdxl_flows.config"]),
        dataset_digest=told["sdxl_flows.dataset_digest"],
        code=record["code"],
        versions=record["versions"],
        stages={name: stages[name] for name in (*ORDER, *stages) if name in stages},
        run=folder,
        metadata=metadata,
        checks=tuple(checks),
    )


def _told_by(file: Path) -> dict[str, str]:
    told = _told_by_folder(file) if file.is_dir() else _told_by_file(file)
    if KEY not in told:
        maker = told.get("modelspec.implementation_version") or told.get("modelspec.title") or "something else"
        raise CheckpointError(
            f"{file}: carries no record of its making; it was made by {maker}, or by a version of sdxl-flows that "
            f"left none. What it says of itself: {', '.join(sorted(told)) or 'nothing'}."
        )
    return told


def _told_by_file(file: Path) -> dict[str, str]:
    if not file.is_file():
        raise ConfigError(f"{file}: there is no such file. Name a model that sdxl-flows has trained.")
    try:
        with safe_open(file, "np") as opened:
            return dict(opened.metadata() or {})
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{file}: not a .safetensors file, or cut short ({error}).") from error


def _told_by_folder(folder: Path) -> dict[str, str]:
    from sdxl_core.models.convert import read_metadata_of  # imports torch

    if not (folder / "unet").is_dir():
        raise ConfigError(f"{folder}: not a diffusers folder (there is no unet/ in it). Name a model in it.")
    return read_metadata_of(folder)


def _digest(file: Path) -> str:
    if file.is_dir():
        from sdxl_core.models.weights import folder_digest  # imports torch

        return folder_digest(file)
    return sha256_file(file)


def _run_folder(file: Path, record: dict[str, Any], run: Path | None) -> Path | None:
    if run is not None:
        if not (run / "run.json").is_file():
            raise ConfigError(f"--run {run}: holds no run.json. Name the folder that the job wrote into (its `out`).")
        return run
    places = (file.resolve().parent.parent, file.resolve().parent, Path(record["run"]))
    return next((place for place in places if (place / "run.json").is_file()), None)


def _stages_of(folder: Path) -> dict[str, Any]:
    stages: dict[str, Any] = read_run_record(folder / "run.json")["stages"]
    return stages


def _compared(what: str, path: Path, sha256: str) -> Check:
    if not path.is_file():
        return Check(what=what, path=path, state="gone")
    return Check(what=what, path=path, state="same" if sha256_file(path) == sha256 else "changed")


def _merged(folder: Path, stages: dict[str, Any]) -> Iterator[Check]:
    merged = stages.get("merge-tags")
    if merged is not None:
        path = folder / Path(merged["result"]["path"]).name
        yield _compared("tags and captions as merged", path, merged["result"]["sha256"])


def _this_file(file: Path, sha256: str, stages: dict[str, Any]) -> Iterator[Check]:
    """The run's last checkpoint is this file, unless it was an earlier one."""
    train = stages.get("train")
    if train is not None and Path(train["result"]["file"]["path"]).name == file.name:
        state = "same" if train["result"]["file"]["sha256"] == sha256 else "changed"
        yield Check(what="this file, as the run recorded it", path=file, state=state)
