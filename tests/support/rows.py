"""Catalogs made of plain rows, for tests."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa

from sdxl_core.catalog.build import join_catalog
from sdxl_core.catalog.config import CatalogConfig, CatalogSource, Kind
from sdxl_core.catalog.parts import PartWriter, TagColumn
from sdxl_core.catalog.records import Catalog
from sdxl_core.catalog.schema import CATEGORY_CODES, ROWS
from sdxl_core.files import digest_of
from sdxl_core.refs import CatalogPartRef
from sdxl_core.rejected import write_rejected


def catalog_of(
    folder: Path, sources: Sequence[Sequence[Mapping[str, Any]]], *, part_rows: int = 1_000, kind: Kind = "folder"
) -> Catalog:
    """A catalog of rows as they stand: columns of `schema.ROWS` by name, `tags` as {category: [tag, …]} or None."""
    configs, parts = [], list[CatalogPartRef]()
    for number, rows in enumerate(sources):
        configs.append(CatalogSource(path=folder / f"source{number}", kind=kind))
        for start in range(0, len(rows), part_rows):
            piece = rows[start : start + part_rows]
            digest = digest_of(number, start, repr(piece))
            path = folder / "catalog" / "parts" / digest[:32]
            write_part(path, piece)
            write_rejected(path.with_name(f"{path.name}.rejected.jsonl"), [])
            parts.append(
                CatalogPartRef(
                    index=len(parts), source=number, digest=digest, path=path, num_seen=len(piece),
                    num_kept=len(piece), num_rejected=0,
                )
            )  # fmt: skip
    join_catalog(CatalogConfig(sources=tuple(configs), out=folder / "catalog", index=False), parts)
    return Catalog.open(folder / "catalog")


def write_part(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    with PartWriter(path) as writer:
        names = [name for name in ROWS.names if name not in ("tags", "key_hash")]
        columns = {name: pa.array([row.get(name) for row in rows], ROWS.field(name).type) for name in names}
        tags = [
            TagColumn(
                CATEGORY_CODES[category],
                pa.array(
                    [None if row.get("tags") is None else row["tags"].get(category, []) for row in rows],
                    pa.list_(pa.string()),
                ),
            )
            for category in dict.fromkeys(category for row in rows for category in row.get("tags") or {})
        ]
        writer.add(columns, tags)
