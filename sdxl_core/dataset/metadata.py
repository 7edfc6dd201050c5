"""Reading metadata JSON as sd-scripts and we write it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import orjson

from sdxl_core.errors import ConfigError, DataError

TAG_CATEGORIES = "tag_categories.json"  # {category: [tags]}, beside the metadata that was merged from a catalog


def read_metadata(path: Path) -> dict[str, dict[str, Any]]:
    """A meta_cap*.json or meta_lat.json, checked.

    Raises: ConfigError: no such file.   DataError: not JSON, or not metadata; the key and what was expected are named.
    """
    try:
        data = orjson.loads(path.read_bytes())
    except FileNotFoundError as error:
        raise ConfigError(f"{path}: there is no such metadata file. `sdxl-flows {maker_of(path)}` makes it.") from error
    except IsADirectoryError as error:
        raise ConfigError(f"{path}: this is a folder; name the metadata JSON in it.") from error
    except orjson.JSONDecodeError as error:
        raise DataError(
            f"{path}: not valid JSON ({error}). It may have been cut short while it was copied. Make it again with "
            f"`sdxl-flows {maker_of(path)}`."
        ) from error
    if not isinstance(data, dict):
        raise DataError(f"{path}: holds a {type(data).__name__}; metadata is one object, picture key -> entry.")
    if not data:
        raise DataError(f"{path}: holds no picture. Make it again with `sdxl-flows {maker_of(path)}`, or name another.")
    check_entries(path, data)
    return data


def maker_of(path: Path) -> str:
    """The command that makes a metadata file of that name."""
    return "cache-latents" if path.name.startswith("meta_lat") else "merge-tags"


def check_entries(path: Path, entries: dict[str, Any]) -> None:
    """Raises: DataError: an entry is not as metadata has them; its key is named."""
    for key, entry in entries.items():
        problem = _entry_problem(entry)
        if problem:
            raise DataError(
                f"{path}: the entry of {key!r} {problem}. This is not a metadata file of ours or sd-scripts'."
            )


def _entry_problem(entry: Any) -> str:
    if not isinstance(entry, dict):
        return f"is {type(entry).__name__}, not an object"
    for field in ("tags", "caption"):
        if not isinstance(entry.get(field, ""), str):
            return f"has {field} that is not a text"
    size = entry.get("train_resolution", [8, 8])
    if not (isinstance(size, list) and len(size) == 2 and all(type(side) is int and side > 0 for side in size)):
        return "has a train_resolution that is not [width, height]"
    return ""
