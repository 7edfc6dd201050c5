"""Command-line options made from the pydantic models, so that help, bounds and defaults exist once."""

from __future__ import annotations

import argparse
import types
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin

from pydantic import BaseModel
from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined

from sdxl_core.configfile import apply_overrides


def dashes(argv: Sequence[str]) -> list[str]:
    """`--learning_rate=1` and `--learning-rate=1` are the same option; `--query -day` is a query, no option -d."""
    result: list[str] = []
    for word in argv:
        name, equals, value = word.partition("=")
        if result and result[-1] == "--query" and word.startswith("-") and not word.startswith("--"):
            result[-1] += "=" + word
        else:
            result.append(name.replace("_", "-") + equals + value if name.startswith("--") else word)
    return result


def add_options(
    parser: argparse.ArgumentParser,
    model: type[BaseModel],
    *,
    all_optional: bool = False,
    leave_out: Collection[str] = (),
) -> None:
    """One option a field: `--field-name VALUE`, `--flag/--no-flag` for a switch; lists may be given repeatedly.

    Args:   all_optional: a file may give the required ones.   leave_out: fields that are no options.
    """
    described = model.model_json_schema()["properties"]
    for name, field in sorted(model.model_fields.items(), key=lambda item: not item[1].is_required()):
        if name in leave_out:
            continue
        kind = _plain_type(field.annotation)
        option = "--" + name.replace("_", "-")
        text = described[name].get("description", name).replace("%", "%%") + _default_text(field)
        shared: dict[str, Any] = {"dest": name, "default": argparse.SUPPRESS, "help": text}
        if kind is bool and name.startswith("no_"):
            parser.add_argument(option, action="store_true", **shared)
        elif kind is bool:
            parser.add_argument(option, action=argparse.BooleanOptionalAction, **shared)
        elif _is_places(kind):
            parser.add_argument(
                option, nargs="+", metavar="PATH", required=field.is_required() and not all_optional, **shared
            )
        elif get_origin(kind) is list:
            parser.add_argument(option, action="append", metavar="TEXT", **shared)
        elif get_origin(kind) is dict:
            parser.add_argument(option, action="append", metavar="FROM=TO", **shared)
        else:
            parser.add_argument(
                option, metavar=_metavar(kind), required=field.is_required() and not all_optional, **shared
            )


def collect_options(namespace: argparse.Namespace, model: type[BaseModel]) -> dict[str, Any]:
    """The values that were given on the command line, ready for `configfile.check`."""
    values: dict[str, Any] = {}
    for name, field in model.model_fields.items():
        if not hasattr(namespace, name):
            continue
        given, kind = getattr(namespace, name), _plain_type(field.annotation)
        if get_origin(kind) is dict:
            given = dict(item.rpartition("=")[::2] for item in given)
        elif get_origin(kind) is tuple and not _is_places(kind):
            given = [part.strip() for part in given.split(",")]
        elif kind not in (str, Path, bool) and get_origin(kind) not in (list, tuple):
            given = apply_overrides({}, [f"value={given}"])["value"]
        values[name] = given
    return values


def _is_places(kind: Any) -> bool:
    """A tuple of paths, or of sections that may be given as paths."""
    return (
        get_origin(kind) is tuple and get_args(kind)[0] not in (str, int, float) and isinstance(get_args(kind)[0], type)
    )


def _plain_type(annotation: Any) -> Any:
    """`X | None` and `Annotated[X, …]` as X."""
    if get_origin(annotation) in (Union, types.UnionType):
        return next(part for part in get_args(annotation) if part is not type(None))
    return annotation


def _metavar(kind: Any) -> str:
    if get_origin(kind) is Literal:
        return "{" + ",".join(str(choice) for choice in get_args(kind)) + "}"
    if get_origin(kind) is tuple:
        return "A,B"
    return {int: "N", float: "X", Path: "PATH"}.get(kind, "TEXT")


def _default_text(field: FieldInfo) -> str:
    if field.is_required() or field.default is PydanticUndefined or field.default in (None, "", [], {}, ()):
        return ""
    default = ",".join(field.default) if isinstance(field.default, tuple) else field.default
    return f" (default: {default})"
