"""What the readers of sources share."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow as pa
import pyarrow.compute as pc

from sdxl_core.catalog.config import CatalogSource
from sdxl_core.catalog.parts import PartWriter, TagColumn
from sdxl_core.dataset.text import parse_tags
from sdxl_core.rejected import Rejected

STAGE = "catalog"


class Piece(NamedTuple):
    """One part to be. `digest`: identity of what will be read (content, or names with sizes and times).

    `label`: for people.   `payload`: what `read` needs to find it again, JSON.   `listing`: what is put into the file
    `payload["listing"]` where the part is still to be read.
    """

    digest: str
    label: str
    payload: dict[str, Any]
    listing: bytes = b""


@dataclass(frozen=True, slots=True)
class Reader:
    """A kind of source."""

    plan: Callable[[CatalogSource, Path], Iterator[Piece]]
    read: Callable[[CatalogSource, dict[str, Any], PartWriter], list[Rejected]]


def rejected(key: str, reason: str, detail: str) -> Rejected:
    return Rejected(stage=STAGE, key=key, reason=reason, detail=detail)


def key_problem(key: str) -> str:
    """Why a key cannot name a picture below a root: "" where it can."""
    if not key:
        return "it is empty"
    if "\0" in key:
        return "it holds a NUL byte"
    if key.startswith(("/", "\\")) or key[1:3] in (":/", ":\\"):
        return "it is an absolute path; map its beginning with root_map"
    if ".." in key.replace("\\", "/").split("/"):
        return "it leads out of the source through '..'"
    return ""


def text_columns(texts: list[str | None], captions: list[str | None]) -> tuple[dict[str, pa.Array], TagColumn]:
    """The columns of pictures whose tags stand in one text each: `raw_tags` where that text is not ", ".join(tags)."""
    tags = [None if text is None else parse_tags(text) for text in texts]
    raw = [
        text if tags_of is not None and text != ", ".join(dict.fromkeys(tags_of)) else None
        for text, tags_of in zip(texts, tags, strict=True)
    ]
    columns = {"raw_tags": pa.array(raw, pa.string()), "caption": pa.array(captions, pa.string())}
    return columns, TagColumn(0, pa.array(tags, pa.list_(pa.string())))


def keys_of_paths(source: CatalogSource, paths: list[str]) -> pa.StringArray:
    """Keys of pictures whose paths below the source, without extension, are given."""
    names = paths if source.key == "path" else [path.rpartition("/")[2] for path in paths]
    return prefixed(source.prefix, pa.array(names, pa.string()))


def prefixed(prefix: str, keys: pa.Array) -> pa.Array:
    return pc.binary_join_element_wise(prefix, keys, "") if prefix else keys
