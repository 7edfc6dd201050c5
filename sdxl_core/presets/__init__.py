"""Sets of parameters to begin with, as TOML that ships with the package: `--preset NAME`, under what a file says."""

from __future__ import annotations

import tomllib
from collections.abc import Mapping
from functools import cache
from importlib.resources import files
from typing import Any, NamedTuple

from sdxl_core.errors import ConfigError


class PresetText(NamedTuple):
    """A preset as it is written. `about`: its first line, without the comment sign."""

    name: str
    about: str
    text: str


@cache
def presets() -> tuple[PresetText, ...]:
    """All that ship, by name."""
    found = [path for path in files("sdxl_core.presets").iterdir() if path.name.endswith(".toml")]
    texts = {path.name.removesuffix(".toml"): path.read_text("utf-8") for path in found}
    return tuple(PresetText(name, text.splitlines()[0].lstrip("# "), text) for name, text in sorted(texts.items()))


def read_preset(name: str) -> dict[str, dict[str, Any]]:
    """A preset's values by section of a job file. Raises: ConfigError: there is none of this name."""
    for preset in presets():
        if preset.name == name:
            return tomllib.loads(preset.text)
    raise ConfigError(
        f"--preset {name}: there is no such preset. There are {', '.join(preset.name for preset in presets())}; "
        f"`sdxl-flows presets` says what they are."
    )


def under_job(preset: str | None, values: Mapping[str, Any]) -> dict[str, Any]:
    """A job file's values over a preset's: what the file says wins. Raises: ConfigError: no such preset."""
    if preset is None:
        return dict(values)
    result: dict[str, Any] = {name: dict(section) for name, section in read_preset(preset).items()}
    for name, value in values.items():
        result[name] = result.get(name, {}) | value if isinstance(value, dict) else value
    return result


def under_training(preset: str | None, values: Mapping[str, Any]) -> dict[str, Any]:
    """A training file's values over those that a preset has for training. Raises: ConfigError: no such preset."""
    return dict(values) if preset is None else {**read_preset(preset).get("train", {}), **values}
