"""Data roots: the folders that parameters may name. Set where others than the machine's owner can start runs.

`SDXL_FLOWS_DATA_ROOTS=/data:/models` (the system's path separator). Unset: no limit. Links and `..` are resolved before
a path is judged, and links among a source's files are judged too.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from pydantic import BaseModel

ROOTS_VARIABLE = "SDXL_FLOWS_DATA_ROOTS"


class NamesFile:
    """Marks a text parameter that is a path unless it is one of the `words` (a preset's name, nothing)."""

    def __init__(self, *words: str) -> None:
        self.words = words


def data_roots() -> tuple[str, ...]:
    """The roots with links resolved; () where there is no limit."""
    value = os.environ.get(ROOTS_VARIABLE, "")
    return tuple(os.path.realpath(root) for root in value.split(os.pathsep) if root.strip())


def is_allowed(path: str | os.PathLike[str], roots: tuple[str, ...]) -> bool:
    """Whether a path, links and `..` resolved, lies in one of `roots`; it need not exist yet."""
    if not roots:
        return True
    real = os.path.realpath(path)
    return any(real == root or real.startswith(os.path.join(root, "")) for root in roots)


def check_inside_roots(section: BaseModel) -> None:
    """Raises: ValueError: a parameter names something outside the roots (pydantic reports it as the section's)."""
    roots = data_roots()
    if not roots:
        return
    for name, path in _paths(section):
        if not is_allowed(path, roots):
            raise ValueError(
                f"{name} = {path}: lies outside the data roots of this machine ({', '.join(roots)}). Move it there, or "
                f"let whoever runs the service add its folder to {ROOTS_VARIABLE}."
            )


def _paths(section: BaseModel) -> Iterator[tuple[str, str | Path]]:
    for name, field in type(section).model_fields.items():
        value = getattr(section, name)
        marker = next((item for item in field.metadata if isinstance(item, NamesFile)), None)
        if isinstance(value, str):
            if marker is not None and value not in marker.words:
                yield name, value
        else:
            yield from ((name, path) for path in _flat(value))


def _flat(value: Any) -> Iterator[Path]:
    if isinstance(value, Path):
        yield value
    elif isinstance(value, Mapping):
        for item in value.values():
            yield from _flat(item)
    elif isinstance(value, (list, tuple)):
        for item in value:
            yield from _flat(item)
