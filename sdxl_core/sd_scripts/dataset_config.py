"""A --dataset_config of sd-scripts (TOML or JSON): datasets of subsets, as the options of a command line of one folder.

Source: docs/config_README-en.md of sd-scripts. What stands in it wins over the command line; a subset's value wins over
its dataset's, and that over [general].
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import orjson

from sdxl_core.configfile import read_toml
from sdxl_core.errors import ConfigError
from sdxl_core.sd_scripts.options import Given, option_table

REPLACED = ("train_data_dir", "in_json", "reg_data_dir")  # of the command line: sd-scripts ignores them beside it
_NAMES = {"batch_size": "train_batch_size", "num_repeats": "dataset_repeats"}
_PLACES = ("image_dir", "metadata_file")
_WHY = {
    "class_tokens": "the text of pictures without a text file; write it into one beside each",
    "is_reg": "regularisation pictures belong to DreamBooth; put them into the collection with tags of their own",
    "conditioning_data_dir": "the mask of a picture is its own alpha channel",
    "custom_attributes": "nothing in sdxl_train.py reads them",
    "network_multiplier": "an option for LoRA; all weights are trained here",
    "prior_loss_weight": "of regularisation pictures, which belong to DreamBooth",
    "skip_image_resolution": "pictures are trained on at one resolution; latents.min_side_px rejects small ones",
    "validation_seed": "held-out pictures are chosen by their keys and the seed",
    "validation_split": "hold pictures out with heldout_share, which also measures their loss",
}  # fmt: skip


@dataclass(slots=True)
class DatasetGiven:
    """given: options by their names on the command line.   off: flags that the file turns off.

    folders, metadata: image_dir and metadata_file of what is trained on, each once.   not_mapped: what of it -> why.
    """

    given: Given = field(default_factory=dict)
    off: set[str] = field(default_factory=set)
    folders: list[str] = field(default_factory=list)
    metadata: list[str] = field(default_factory=list)
    not_mapped: dict[str, str] = field(default_factory=dict)


def read_dataset_config(path: Path) -> DatasetGiven:
    """Raises: ConfigError: unreadable, or no subset in it that can be trained on."""
    result = DatasetGiven()
    subsets = _trained(_subsets(_read(path), path), result, path)
    result.folders = list(dict.fromkeys(str(subset["image_dir"]) for subset in subsets.values()))
    result.metadata = list(dict.fromkeys(str(s["metadata_file"]) for s in subsets.values() if "metadata_file" in s))
    names = dict.fromkeys(name for subset in subsets.values() for name in subset if name not in _PLACES)
    for name in names:
        values = {label: subset[name] for label, subset in subsets.items() if name in subset}
        _take(result, name, values, num_subsets=len(subsets), path=path)
    return result


def _read(path: Path) -> dict[str, Any]:
    if path.suffix.lower() != ".json":
        return read_toml(path)
    try:
        values = orjson.loads(path.read_bytes())
    except (OSError, orjson.JSONDecodeError) as error:
        raise ConfigError(f"{path}: not readable as JSON ({error}).") from error
    return values if isinstance(values, dict) else {}


def _subsets(config: Mapping[str, Any], path: Path) -> dict[str, dict[str, Any]]:
    """Every subset with all that holds for it, by where it stands."""
    general, datasets = config.get("general", {}), config.get("datasets", [])
    if not _are_tables([general]) or not _are_tables(datasets):
        raise ConfigError(f"{path}: is not a dataset config: [general] and [[datasets]] must be tables.")
    found: dict[str, dict[str, Any]] = {}
    for number, dataset in enumerate(datasets, 1):
        shared, subsets = {name: dataset[name] for name in dataset if name != "subsets"}, dataset.get("subsets", [])
        if not _are_tables(subsets):
            raise ConfigError(f"{path}: is not a dataset config: the subsets of dataset {number} must be tables.")
        for place, subset in enumerate(subsets, 1):
            found[f"dataset {number}, subset {place}"] = {**general, **shared, **subset}
    if not found:
        raise ConfigError(
            f"{path}: no dataset config: there is no [[datasets.subsets]] in it. Name the file that "
            f"--dataset_config names."
        )
    return found


def _are_tables(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(item, dict) for item in value)


def _trained(subsets: dict[str, dict[str, Any]], result: DatasetGiven, path: Path) -> dict[str, dict[str, Any]]:
    """The subsets that can be trained on together; why the others cannot is noted."""
    kept: dict[str, dict[str, Any]] = {}
    for label, subset in subsets.items():
        why = _why_not(subset, next(iter(kept.values()), None))
        named = ", ".join(f"{name} = {subset[name]}" for name in _PLACES if name in subset)
        if why:
            result.not_mapped[f"{label} ({named})"] = why
        else:
            kept[label] = subset
    if not kept:
        reasons = "; ".join(f"{label}: {why}" for label, why in result.not_mapped.items())
        raise ConfigError(f"{path}: none of its subsets can be trained on here. {reasons}.")
    return kept


def _why_not(subset: Mapping[str, Any], first: Mapping[str, Any] | None) -> str:
    for name in ("is_reg", "conditioning_data_dir"):
        if subset.get(name):
            return _WHY[name]
    if "image_dir" not in subset:
        return "it names no image_dir: the folder of the latents (or pictures) has to be named"
    if first is None:
        return ""
    if ("metadata_file" in subset) != ("metadata_file" in first):
        return "a run trains on cached latents with their metadata, or caches folders first; cache this one, too"
    if "metadata_file" in subset and subset["image_dir"] != first["image_dir"]:
        return (
            "latents are read below one folder: put them there, join the metadata with sdxl-flows merge-json, and name "
            "both in place of the first subset's"
        )
    return ""


def _take(result: DatasetGiven, name: str, values: Mapping[str, Any], *, num_subsets: int, path: Path) -> None:
    """One option of all subsets: a value for all, or the first with a word about the others."""
    option = option_table().get(_NAMES.get(name, name))
    label = f"{name} ({path.name})"
    if name in _WHY or option is None:
        if any(value not in (False, None, 0) for value in values.values()):
            result.not_mapped[label] = _WHY.get(name, "sdxl_train.py (0.10.1) has no such option of a dataset")
        return
    (first, value), *_ = values.items()
    if len(values) < num_subsets or any(other != value for other in values.values()):
        result.not_mapped[label] = (
            f"not the same for all subsets; here one value holds for all pictures, and {value!r} of {first} was taken"
        )
    if name == "num_repeats" and all(count == 1 for count in values.values()):
        return
    if option.default == "flag":
        if value:
            result.given[option.name] = True
        else:
            result.off.add(option.name)
    elif isinstance(value, list) and option.default != "list":
        result.given[option.name] = ",".join(map(str, value))
    else:
        result.given[option.name] = value
