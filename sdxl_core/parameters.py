"""What a parameter may be, in words, read from the JSON schema of its model: for help texts, forms and lists alike."""

from __future__ import annotations

import json
import textwrap
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from pydantic import BaseModel

KINDS = {"integer": "whole number", "number": "number", "boolean": "true or false", "string": "text"}


@dataclass(frozen=True, slots=True, kw_only=True)
class Parameter:
    """One parameter of a model. `name`: with its sections, "train.seed".   `default`: None also where it is needed."""

    name: str
    kind: str
    is_needed: bool
    default: Any
    help: str


def parameters(model: type[BaseModel]) -> Iterator[Parameter]:
    """Every parameter of a model and of the sections in it, in the order of the form."""
    schema = model.model_json_schema()
    yield from _parameters(schema, schema.get("$defs", {}), "")


def _parameters(section: Mapping[str, Any], sections: Mapping[str, Any], prefix: str) -> Iterator[Parameter]:
    for name, field in section["properties"].items():
        if "$ref" in field:
            yield from _parameters(sections[field["$ref"].rpartition("/")[2]], sections, f"{prefix}{name}.")
            continue
        yield Parameter(
            name=prefix + name,
            kind=_kind(field),
            is_needed=name in section.get("required", []),
            default=field.get("default"),
            help=field.get("description", ""),
        )


def parameter_text(one: Parameter) -> str:
    """`train.seed = 0   (whole number)`, and below it what it does with its bounds."""
    value = "(needed)" if one.is_needed else f"= {_toml(one.default)}"
    lines = textwrap.wrap(one.help, 100)
    return "\n    ".join([f"{one.name} {value}   ({one.kind})", *lines])


def _toml(value: Any) -> str:
    """A default as a job file would have it; "unset" where there is none."""
    if isinstance(value, dict) and value:
        return "{ " + ", ".join(f"{name} = {_toml(item)}" for name, item in value.items()) + " }"
    return "unset" if value is None else json.dumps(value)


def with_bounds(field: dict[str, Any]) -> dict[str, Any]:
    """A field's JSON schema, its description followed by its bounds: "sides are multiples of this [8 to 1,024]"."""
    found = bounds(field)
    return field | {"description": f"{field['description']} [{found}]"} if found and "description" in field else field


def bounds(field: Mapping[str, Any]) -> str:
    """What a field's JSON schema allows: "8 to 1,024, a multiple of 8"; "" where it sets no bounds."""
    field = _not_null(field)
    inner = field.get("items") or field.get("additionalProperties")
    if isinstance(inner, dict):
        return f"each {found}" if (found := bounds(inner)) else ""
    low, high = field.get("minimum"), field.get("maximum")
    if low is not None and high is not None:
        words = [f"{_number(low)} to {_number(high)}"]
    else:
        words = [
            f"{word} {_number(field[key])}"
            for key, word in (
                ("minimum", "at least"),
                ("exclusiveMinimum", "more than"),
                ("maximum", "at most"),
                ("exclusiveMaximum", "less than"),
            )
            if key in field
        ]
    words += [f"a multiple of {field['multipleOf']}"] if "multipleOf" in field else []
    words += [f"pattern {field['pattern']}"] if "pattern" in field else []
    return ", ".join(words)


def _kind(field: Mapping[str, Any]) -> str:
    field = _not_null(field)
    if "enum" in field:
        return " | ".join(str(choice) for choice in field["enum"])
    if "prefixItems" in field:
        return f"[{', '.join(_kind(item) for item in field['prefixItems'])}]"
    if field.get("type") == "array":
        return f"[{_kind(field['items'])}, \u2026]"
    if field.get("type") == "object":
        return "table"
    return "path" if field.get("format") == "path" else KINDS.get(field.get("type", ""), "section")


def _not_null(field: Mapping[str, Any]) -> Mapping[str, Any]:
    """`X | None` as X."""
    variants = [variant for variant in field.get("anyOf", []) if variant.get("type") != "null"]
    return variants[0] if variants else field


def _number(value: float) -> str:
    return "2^63" if value == 2**63 else f"{value:,.10g}" if isinstance(value, float) else f"{value:,}"
