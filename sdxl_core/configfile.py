"""From what people write (TOML, --set KEY=VALUE, flags) to a checked config, with errors that name the key."""

from __future__ import annotations

import difflib
import tomllib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

from sdxl_core.errors import ConfigError

M = TypeVar("M", bound=BaseModel)


def read_toml(path: Path) -> dict[str, Any]:
    """A TOML file as nested dicts. Raises: ConfigError: missing, unreadable or not TOML (with the line)."""
    try:
        return tomllib.loads(path.read_text("utf-8-sig"))
    except FileNotFoundError as error:
        raise ConfigError(
            f"{path}: there is no such file. docs/job_file.md shows what a job file looks like."
        ) from error
    except IsADirectoryError as error:
        raise ConfigError(f"{path}: this is a folder; name the .toml file in it.") from error
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path}: not a text file ({error.reason} at byte {error.start}).") from error
    except tomllib.TOMLDecodeError as error:
        raise ConfigError(
            f"{path}: not valid TOML: {error}. (Windows paths need 'single quotes' or forward slashes.)"
        ) from error
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read ({error.strerror}).") from error


def apply_overrides(values: dict[str, Any], overrides: Iterable[str]) -> dict[str, Any]:
    """Apply `section.key=value` strings over nested dicts; values are TOML, or plain text where they are not.

    Raises: ConfigError: no "=", or a key that leads through a value that is no section.
    """
    result: dict[str, Any] = dict(values)
    for override in overrides:
        key, equals, text = override.partition("=")
        if not equals or not key.strip():
            raise ConfigError(f"--set {override!r}: write it as KEY=VALUE, for example --set train.learning_rate=1e-5.")
        *sections, name = key.strip().replace("-", "_").split(".")
        place = result
        for section in sections:
            inner = place.get(section, {})
            if not isinstance(inner, dict):
                raise ConfigError(f"--set {override!r}: {section} is a single value, not a section with keys in it.")
            place[section] = dict(inner)
            place = place[section]
        place[name] = _toml_value(text.strip())
    return result


def _toml_value(text: str) -> Any:
    try:
        return tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        return text


def check(model: type[M], values: Mapping[str, Any], *, where: str, overrides: Sequence[str] = ()) -> M:
    """Build a config from plain values.

    Args:   where: what to call the source of the values in an error.   overrides: those in `values` that `--set` gave.
    Raises: ConfigError: one line a wrong value, with where it was given, its key, the value and what is allowed.
    """
    try:
        return model.model_validate(values)
    except ValidationError as error:
        lines: dict[str, list[str]] = {}
        for detail in error.errors():
            lines.setdefault(_given_in(detail, where, overrides), []).append(_explain(model, detail))
        raise ConfigError("\n".join(f"{place}: " + "\n  ".join(told) for place, told in lines.items())) from error


def _given_in(detail: ErrorDetails, where: str, overrides: Sequence[str]) -> str:
    """What gave the wrong value: a `--set`, what `where` names, or both (where values contradict each other)."""
    key = [str(part) for part in detail["loc"]]
    beside: list[str] = []
    for override in reversed(overrides):  # the last one wins
        changed = override.partition("=")[0].strip().replace("-", "_").split(".")
        if detail["type"] != "missing" and changed == key[: len(changed)]:
            return f"--set {override}"
        if key == changed[: len(key)]:
            beside.insert(0, f"--set {override}")
    return " with ".join([where, *beside])


def _explain(model: type[BaseModel], detail: ErrorDetails) -> str:
    parts = [str(part) for part in detail["loc"]]
    key = ".".join(parts) or "the whole"
    if detail["type"] == "extra_forbidden":
        near = similar_keys(key, list(_all_keys(model)))
        return f"{key}: there is no such parameter." + (f" Did you mean {' or '.join(near)}?" if near else "")
    if detail["type"] == "missing":
        return f"{key}: is needed and was not given."
    message = detail["msg"].removeprefix("Value error, ")
    if not parts or isinstance(detail["input"], dict):
        return f"{key}: {message}" if parts else message
    return f"{key} = {detail['input']!r}: {message[0].lower()}{message[1:]}"


def similar_keys(key: str, known: Sequence[str]) -> list[str]:
    """At most three of the known keys that a wrong one may stand for; the first rule that finds any decides.

    sd-scripts' name for it; the initials of its words (lr: learning_rate); a near spelling; words in common.
    """
    from sdxl_core.sd_scripts.options import option_table

    section, _, name = key.rpartition(".")
    option = option_table().get(name)
    meant = {option.to, option.to.rpartition(".")[2]} if option is not None and option.to else set()
    beginning = f"{section}." if section else ""
    last = {other: other.rpartition(".")[2] for other in known if other.startswith(beginning)}
    last = last or {other: other.rpartition(".")[2] for other in known}
    initials = {other: "".join(word[0] for word in text.split("_")) for other, text in last.items()}
    near = difflib.get_close_matches(name, last.values(), n=1, cutoff=0.7)
    words = set(name.split("_"))
    common = {other: len(words & set(text.split("_"))) for other, text in last.items()}
    rules = (
        [other for other in known if other in meant],
        [other for other in last if initials[other] == name],
        [other for other in last if initials[other].endswith(name)],
        [other for other in last if common[other] == len(words)],
        [other for other in last if last[other] in near],
        [other for other in last if common[other] == max(1, *common.values())],
        difflib.get_close_matches(key, known, n=1, cutoff=0.8),
    )
    return next((found[:3] for found in rules if found), [])


def _all_keys(model: type[BaseModel], prefix: str = "") -> Iterator[str]:
    for name, field in model.model_fields.items():
        if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
            yield from _all_keys(field.annotation, f"{prefix}{name}.")
        else:
            yield prefix + name
