"""An `accelerate launch … sdxl_train.py …` command line as parameters of ours: what it says, and what it leaves unsaid

where sd-scripts' default is not ours.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sdxl_core.config import JobConfig, TrainConfig
from sdxl_core.configfile import check
from sdxl_core.errors import ConfigError
from sdxl_core.sd_scripts.command_line import find_command
from sdxl_core.sd_scripts.conversions import Conversion, mapped_path
from sdxl_core.sd_scripts.dataset_config import REPLACED, read_dataset_config
from sdxl_core.sd_scripts.options import Given, read_config_file, read_options

_LAUNCHER_WORDS = {
    "num_processes": "train.num_processes",
    "mixed_precision": "train.mixed_precision",
}
_LAUNCHER_WHY = "accelerate's configuration is written from our parameters at every start"


@dataclass(frozen=True, slots=True, kw_only=True)
class Imported:
    """`kind`: "train" where the latents are cached already (--in_json), else "job".

    values: our parameters as nested plain values, checked.   mapped: option -> our parameter.
    not_mapped: option -> why.   notes: what to look at.
    """

    kind: str
    values: dict[str, Any]
    mapped: dict[str, str]
    not_mapped: dict[str, str]
    notes: tuple[str, ...]


def import_command(path: Path, *, root_map: Mapping[str, str] | None = None) -> Imported:
    """Read a file with one command line of sdxl_train.py.

    Args:   root_map: beginnings of its paths to be replaced: {"H:/just_astolfo": "/data/just_astolfo"}.
    Raises: ConfigError: no such file, no such command in it, or values that cannot be right here.
    """
    text = _read(path)
    command = find_command(text, where=str(path))
    given, strange = read_options(command.words, where=str(path))
    if "config_file" in given:
        found, unknown = read_config_file(_config_file(str(given["config_file"]), path, root_map or {}))
        given, strange = found | given, strange | unknown
    notes = _take_dataset_config(given, strange, path, root_map or {}) if "dataset_config" in given else []
    conversion = Conversion(given, root_map=root_map or {})
    conversion.notes += notes
    _read_launcher(command.launcher, conversion, strange)
    conversion.run()
    kind = "train" if "in_json" in given else "job"
    values = conversion.nested(kind)
    checked = check(TrainConfig if kind == "train" else JobConfig, values, where=str(path))
    values = checked.model_dump(mode="json", exclude_unset=True)  # texts that are numbers have become numbers
    mapped = {f"--{name}": place for name, place in conversion.mapped.items()}
    not_mapped = strange | {f"--{name}": why for name, why in conversion.not_mapped.items()}
    unheard = {f"--{name}" for name in given} - set(mapped) - set(not_mapped)
    assert not unheard, unheard
    return Imported(kind=kind, values=values, mapped=mapped, not_mapped=not_mapped, notes=tuple(conversion.notes))


def _read(path: Path) -> str:
    try:
        return path.read_bytes().decode("utf-8-sig")
    except FileNotFoundError as error:
        raise ConfigError(
            f"{path}: there is no such file. Put the command line into a text file and name it."
        ) from error
    except IsADirectoryError as error:
        raise ConfigError(f"{path}: this is a folder; name the file that holds the command line.") from error
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path}: not a text file ({error.reason} at byte {error.start}).") from error


def _take_dataset_config(given: Given, strange: dict[str, str], path: Path, root_map: Mapping[str, str]) -> list[str]:
    """Put what a --dataset_config says in place of what the command line says. Returns what has to be done first."""
    file = _named_file("dataset_config", str(given["dataset_config"]), path, root_map)
    found = read_dataset_config(file)
    for name in REPLACED:
        if given.pop(name, None) is not None:
            strange[f"--{name}"] = "sdxl_train.py ignores it beside --dataset_config"
    for name in found.off:
        given.pop(name, None)
    given |= found.given
    strange |= found.not_mapped
    out = mapped_path(str(given.get("output_dir", "OUT")), root_map)
    folders, metadata = ([mapped_path(name, root_map) for name in each] for each in (found.folders, found.metadata))
    given["train_data_dir"] = found.folders[0]
    if found.metadata:
        given["in_json"] = found.metadata[0]
    if len(folders) > 1:
        given["train_data_dir"] = f"{out}/catalog"
        ends = [Path(name).name for name in folders]  # pictures of one name in two folders stay two
        prefixes = ends if len(set(ends)) == len(ends) else [f"{i}-{end}" for i, end in enumerate(ends, 1)]
        sources = " ".join(f'"{prefix}/={name}"' for prefix, name in zip(prefixes, folders, strict=True))
        return [
            f"these are {len(folders)} folders; make a catalog of them first: sdxl-flows catalog --sources {sources} "
            f'--out "{out}/catalog"'
        ]
    if len(metadata) > 1:
        given["in_json"] = f"{out}/meta_joined.json"
        sources = " ".join(f'"{name}"' for name in metadata)
        return [
            f"these are {len(metadata)} metadata files; join them first: sdxl-flows merge-json --sources {sources} "
            f'--out "{out}/meta_joined.json"'
        ]
    return []


def _config_file(name: str, path: Path, root_map: Mapping[str, str]) -> Path:
    """Where a --config_file is. sd-scripts lets .toml be left out."""
    return _named_file("config_file", name if name.endswith(".toml") else name + ".toml", path, root_map)


def _named_file(option: str, name: str, path: Path, root_map: Mapping[str, str]) -> Path:
    """Where a file that the command line names is: as named, or beside the file that names it. Raises: ConfigError."""
    name = mapped_path(name, root_map)
    places = [Path(name), path.parent / name, path.parent / name.rpartition("/")[2]]
    found = next((place for place in places if place.is_file()), None)
    if found is None:
        raise ConfigError(
            f"{path}: --{option} {name} is not there. Copy it beside {path.name}, or say where its folder is now: "
            f"--root-map FROM=TO."
        )
    return found


def _read_launcher(words: tuple[str, ...], conversion: Conversion, strange: dict[str, str]) -> None:
    rest = list(words)
    while rest:
        name, equals, value = rest.pop(0).partition("=")
        if not name.startswith("--"):
            if re.fullmatch(r"\w+", name) and equals:
                strange[name] = "an environment variable; set it where you start sdxl-flows"
            continue
        if not equals and rest and not rest[0].startswith("-") and not re.search(r"^-?m$|accelerate|\.py$", rest[0]):
            value = rest.pop(0)
        name = name[2:].replace("-", "_")
        if name in _LAUNCHER_WORDS and value:
            conversion.launched[name] = value
            conversion.mapped[f"{name} (accelerate launch)"] = _LAUNCHER_WORDS[name]
        else:
            strange[f"--{name} (accelerate launch)"] = (
                "each process gets an equal share of the cores" if name.startswith("num_cpu") else _LAUNCHER_WHY
            )
