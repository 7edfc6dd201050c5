"""What was imported as a TOML file, and the table of options as a page."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from sdxl_core.sd_scripts.importing import Imported
from sdxl_core.sd_scripts.options import option_table


def as_toml(imported: Imported, *, source: str) -> str:
    """A file for `sdxl-flows train --config` or `sdxl-flows run`, with what could not be carried over as comments."""
    command = "train --config" if imported.kind == "train" else "run"
    lines = [f"# From {source}. Start it with: sdxl-flows {command} THIS_FILE"]
    lines += [f"# Note: {note}." for note in imported.notes]
    plain = {key: value for key, value in imported.values.items() if imported.kind == "train" or not _is_section(value)}
    sections = {} if imported.kind == "train" else {k: v for k, v in imported.values.items() if _is_section(v)}
    lines += ["", *(f"{key} = {toml_value(value)}" for key, value in plain.items())]
    for name, section in sections.items():
        lines += ["", f"[{name}]", *(f"{key} = {toml_value(value)}" for key, value in section.items())]
    if imported.not_mapped:
        lines += ["", f"# Not carried over ({len(imported.not_mapped)} options), and why:"]
        lines += [f"#   {option}: {why}." for option, why in imported.not_mapped.items()]
    return "\n".join(lines) + "\n"


def toml_value(value: Any) -> str:
    """A plain value in TOML; a number that came as text is written as a number."""
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, (int, float)):
        return repr(value)
    if isinstance(value, (list, tuple)):
        return "[" + ", ".join(toml_value(item) for item in value) + "]"
    if isinstance(value, Mapping):
        return "{ " + ", ".join(f"{json.dumps(key)} = {toml_value(item)}" for key, item in value.items()) + " }"
    return json.dumps(str(value), ensure_ascii=False)


def options_markdown() -> str:
    """Every option of sdxl_train.py in a table: what it becomes, or why it becomes nothing."""
    lines: list[str] = []
    group = ""
    for option in option_table().values():
        if option.group != group:
            group = option.group
            count = sum(other.group == group for other in option_table().values())
            lines += ["", f"### {group} ({count})", "", "| sd-scripts | here |", "|---|---|"]
        here = f"`{option.to}`" if option.to else option.why
        lines.append(f"| `--{option.name}` | {here} |")
    return "\n".join(lines[1:]) + "\n"


def _is_section(value: Any) -> bool:
    return isinstance(value, dict)
