"""Prefect settings that belong to the project (tasks/prefect.toml), as environment defaults: the user's own win."""

import os
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

FILE = Path(__file__).with_name("prefect.toml")


def apply_settings() -> None:
    """Set every setting that the environment leaves open. Call before `import prefect`.

    Prefect reads `prefect.toml` from the current folder only; runs start in other folders, too.
    """
    for name, value in _flat(tomllib.loads(FILE.read_text("utf-8")), "PREFECT"):
        os.environ.setdefault(name, value)
    os.environ.setdefault("DO_NOT_TRACK", "1")


def _flat(values: dict[str, Any], prefix: str) -> Iterator[tuple[str, str]]:
    for key, value in values.items():
        name = f"{prefix}_{key.upper()}"
        if isinstance(value, dict):
            yield from _flat(value, name)
        else:
            yield name, str(value).lower() if isinstance(value, bool) else str(value)
