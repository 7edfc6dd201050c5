"""The readers of each kind of source. Each has

plan(source, work) -> Iterator[Piece]                 what there is, cheaply, in pieces of at most PART_ROWS rows
read(source, payload, writer) -> list[Rejected]       one piece: its rows go to the writer, the rest is told
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from importlib import import_module
from pathlib import Path

from sdxl_core.catalog.config import CatalogSource
from sdxl_core.catalog.sources.base import Reader
from sdxl_core.errors import ConfigError

_BY_ENDING = {".parquet": "parquet", ".tar": "tars", ".json": "json", ".jsonl": "jsonl"}


def check_sources(sources: Sequence[CatalogSource]) -> None:
    """Before anything is written. Raises: ConfigError: one is not there, of no known kind, or has no ratings."""
    for source in sources:
        path = source.path
        if source.kind != "folder" and not path.exists():
            raise ConfigError(
                f"source = {path}: does not exist. Name a folder of pictures, of tars or of parquet files, or a file "
                f"that ends in {', '.join(_BY_ENDING)}."
            )
        if source.kind == "auto" and path.is_file() and kind_of(source) == "folder":
            raise ConfigError(
                f"source = {path}: a file of no known kind; {', '.join(_BY_ENDING)} are known by their ending, others "
                f"need `kind`. A TOML with [[sources]] is given with --config."
            )
        if source.ratings and resolved(source).kind in ("folder", "tars"):
            raise ConfigError(
                f"source = {path}: `ratings` is set and pictures beside text files have none. Put `ratings` at the "
                f"parquet, JSON or JSONL source that knows them; it leaves out the pictures of all sources."
            )


def resolved(source: CatalogSource) -> CatalogSource:
    """The source as a catalog keeps it: its kind found out, its path absolute."""
    kind = source.kind if source.kind != "auto" else kind_of(source)
    return source.model_copy(update={"kind": kind, "path": Path(os.path.abspath(source.path))})


def reader_of(source: CatalogSource) -> Reader:
    """The reader of a resolved source."""
    reader: Reader = import_module(f"{__name__}.{resolved(source).kind}").READER
    return reader


def kind_of(source: CatalogSource) -> str:
    """What a path holds, by its ending or, for a folder, by what lies in it; a folder of pictures if nothing else."""
    if source.path.is_dir():
        for entry in sorted(source.path.iterdir()):
            if _BY_ENDING.get(entry.suffix.lower()) in ("parquet", "tars") and entry.is_file():
                return _BY_ENDING[entry.suffix.lower()]
        return "folder"
    return _BY_ENDING.get(source.path.suffix.lower(), "folder")
