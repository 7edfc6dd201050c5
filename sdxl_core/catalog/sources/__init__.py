"""The readers of each kind of source. Each has

plan(source, work) -> Iterator[Piece]                 what there is, cheaply, in pieces of at most PART_ROWS rows
read(source, payload, writer) -> list[Rejected]       one piece: its rows go to the writer, the rest is told
"""

from __future__ import annotations

import os
from importlib import import_module
from pathlib import Path

from sdxl_core.catalog.config import CatalogSource
from sdxl_core.catalog.sources.base import Reader


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
    by_ending = {".parquet": "parquet", ".tar": "tars", ".json": "json", ".jsonl": "jsonl"}
    if source.path.is_dir():
        for entry in sorted(source.path.iterdir()):
            if by_ending.get(entry.suffix.lower()) in ("parquet", "tars") and entry.is_file():
                return by_ending[entry.suffix.lower()]
        return "folder"
    return by_ending.get(source.path.suffix.lower(), "folder")
