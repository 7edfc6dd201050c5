"""The options of sdxl_train.py, and which values a command line gives them."""

from __future__ import annotations

import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import Any

from sdxl_core.configfile import read_toml
from sdxl_core.errors import ConfigError

Given = dict[str, Any]  # option -> text, True for a flag, list of texts; from a config file also numbers


@dataclass(frozen=True, slots=True, kw_only=True)
class Option:
    """`default`: sd-scripts' own, as text; or "flag", "list".   `to`: our parameter; "" where there is none: `why`."""

    name: str
    group: str
    default: str
    to: str = ""
    why: str = ""


@cache
def option_table() -> Mapping[str, Option]:
    """All of sdxl_train.py's options by name, in its own groups."""
    table = tomllib.loads(files("sdxl_core.sd_scripts").joinpath("options.toml").read_text("utf-8"))
    return {
        name: Option(name=name, group=group, **entry)
        for group, options in table.items()
        for name, entry in options.items()
    }


def read_options(words: Sequence[str], *, where: str) -> tuple[Given, dict[str, str]]:
    """What a command line says, as argparse would read it: `--a b`, `--a=b`, unambiguous beginnings, the last one wins.

    Returns: the options of the table, and words that are none with the reason.
    Raises: ConfigError: an option lacks its value, or has one too many.
    """
    given: Given = {}
    strange: dict[str, str] = {}
    rest = list(words)
    while rest:
        word = rest.pop(0)
        name, equals, value = word.partition("=")
        values = [value] if equals else []
        if not name.startswith("--"):
            strange[word] = "not an option; sdxl_train.py would refuse it"
            continue
        option = _named(name[2:], where)
        takes_many = option is None or option.default == "list"
        while not equals and rest and not rest[0].startswith("--"):
            if (values and not takes_many) or (option is not None and option.default == "flag"):
                break
            values.append(rest.pop(0))
        if option is None:
            strange[name] = "sdxl_train.py (0.10.1) has no such option"
        elif option.default == "flag":
            if equals:
                raise ConfigError(f"{where}: {word}: --{option.name} takes no value.")
            given[option.name] = True
        elif not values:
            raise ConfigError(f"{where}: --{option.name} needs a value and has none.")
        else:
            given[option.name] = values if option.default == "list" else values[0]
    return given, strange


def read_config_file(path: Path) -> tuple[Given, dict[str, str]]:
    """A --config_file: TOML whose sections do not matter. Values of null and false say nothing. Raises: ConfigError."""
    given: Given = {}
    strange: dict[str, str] = {}
    for name, value in _flat(read_toml(path)):
        option = option_table().get(name)
        if option is None:
            strange[name] = f"in {path.name}: sdxl_train.py (0.10.1) has no such option"
        elif option.default == "flag":
            if value:
                given[name] = True
        else:
            given[name] = [str(item) for item in value] if option.default == "list" else value
    return given, strange


def _named(name: str, where: str) -> Option | None:
    table = option_table()
    if name in table:
        return table[name]
    matching = [option for option in table if option.startswith(name)]
    if len(matching) > 1:
        raise ConfigError(f"{where}: --{name} could be any of {', '.join('--' + option for option in matching)}.")
    return table[matching[0]] if matching else None


def _flat(values: Mapping[str, Any]) -> list[tuple[str, Any]]:
    pairs: list[tuple[str, Any]] = []
    for name, value in values.items():
        pairs += _flat(value) if isinstance(value, dict) else [(name, value)]
    return pairs
