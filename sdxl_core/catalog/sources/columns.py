"""Which column of a dump says what."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa
import pyarrow.compute as pc

from sdxl_core.catalog.config import CatalogSource
from sdxl_core.catalog.schema import CATEGORIES, CATEGORY_CODES
from sdxl_core.errors import DataError

# What dumps call a fact; the first that is there counts. After a dot: a field of a struct column.
FACT_NAMES = {
    "width": ("image_width", "width", "file.width"),
    "height": ("image_height", "height", "file.height"),
    "rating": ("rating",),
    "score": ("score", "score.total"),
    "fav_count": ("fav_count",),
}
TAG_PREFIX = "tag_string"
_INDEX = "__index_level_0__"


@dataclass(frozen=True, slots=True)
class Columns:
    """Columns by what they say, as `name` or, for a field of a struct column, `name.field`.

    `facts`: by name in schema.ROWS.   `tags`: category code and column, ascending by code.
    """

    id: str
    facts: dict[str, str]
    tags: tuple[tuple[int, str], ...]
    captions: tuple[str, ...]

    def top_level(self, schema: pa.Schema) -> list[str]:
        """Names of the columns to read."""
        wanted = (self.id, *self.facts.values(), *(name for _, name in self.tags), *self.captions)
        return list(dict.fromkeys(name if name in schema.names else name.partition(".")[0] for name in wanted))


def find_columns(schema: pa.Schema, source: CatalogSource, path: Path) -> Columns:
    """Find what `source.use` asks for in a dump.

    Raises: DataError: no column of the id, a column that was asked for is not there or there twice, or nothing of use.
    """
    doubled = [name for name in dict.fromkeys(schema.names) if schema.names.count(name) > 1]
    if doubled:
        raise DataError(
            f"{path}: it has more than one column {', '.join(doubled)}, so it is unknown which one counts. Write it "
            f"again with each column once."
        )
    facts = {name: _first(schema, FACT_NAMES[name]) for name in FACT_NAMES if _is_used(source, name)}
    found = Columns(
        id=_id_column(schema, source, path),
        facts={name: column for name, column in facts.items() if column},
        tags=_tag_columns(schema, source, path) if "tags" in source.use else (),
        captions=tuple(c for c in source.caption_columns if _type_of(schema, c) is not None)
        if "captions" in source.use
        else (),
    )
    if source.ratings and "rating" not in found.facts:
        raise _missing(schema, path, "ratings", "a column rating, by which rows are picked; remove `ratings`")
    if not (found.facts or found.tags or found.captions):
        wanted = {"facts": "rating, score, …", "tags": "tag_string…", "captions": " or ".join(source.caption_columns)}
        names = "; ".join(f"{use}: {wanted[use]}" for use in source.use if use in wanted)
        raise _missing(schema, path, "tag_columns or caption_columns", f"any column that says something ({names})")
    return found


def field_of(batch: pa.RecordBatch, name: str) -> pa.Array:
    """A column, or a field of a struct column with the struct's nulls."""
    if name in batch.schema.names:
        return batch.column(name)
    top, _, field = name.partition(".")
    return pc.struct_field(batch.column(top), field)


def is_list(kind: pa.DataType) -> bool:
    return bool(pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind))


def _is_used(source: CatalogSource, fact: str) -> bool:
    return "facts" in source.use or (fact == "rating" and bool(source.ratings))


def _id_column(schema: pa.Schema, source: CatalogSource, path: Path) -> str:
    if source.id_column:
        if _type_of(schema, source.id_column) is None:
            raise _missing(schema, path, "id_column", f"the column {source.id_column}")
        return source.id_column
    pandas = schema.pandas_metadata or {}
    index = [name for name in pandas.get("index_columns", ()) if isinstance(name, str)]
    found = _first(schema, ("id", *index[:1], _INDEX))
    if not found:
        raise _missing(schema, path, "id_column", "a column id or a stored pandas index, which names the picture")
    return found


def _tag_columns(schema: pa.Schema, source: CatalogSource, path: Path) -> tuple[tuple[int, str], ...]:
    chosen = source.tag_columns
    for name in chosen.values():
        if _type_of(schema, name) is None:
            raise _missing(schema, path, "tag_columns", f"the column {name}")
    if not chosen:
        chosen = {c: f"{TAG_PREFIX}_{c}" for c in CATEGORIES[1:] if f"{TAG_PREFIX}_{c}" in schema.names}
    if not chosen:
        chosen = {c: c for c in CATEGORIES[1:] if c in schema.names and is_list(schema.field(c).type)}
    if not chosen:
        single = _first(schema, (TAG_PREFIX, "tags"))
        kind = _type_of(schema, single) if single else None
        if kind is not None and pa.types.is_struct(kind):
            fields = [kind.field(number) for number in range(kind.num_fields)]
            known = [f.name if f.name in CATEGORY_CODES else "" for f in fields]
            return tuple(sorted((CATEGORY_CODES[c], f"{single}.{f.name}") for c, f in zip(known, fields, strict=True)))
        chosen = {"": single} if single else {}
    return tuple(sorted((CATEGORY_CODES[category], name) for category, name in chosen.items()))


def _first(schema: pa.Schema, names: tuple[str, ...]) -> str:
    for name in names:
        kind = _type_of(schema, name)
        if kind is not None and (name == "tags" or not pa.types.is_struct(kind)):
            return name
    return ""


def _type_of(schema: pa.Schema, name: str) -> pa.DataType | None:
    if name in schema.names:
        return schema.field(name).type
    top, _, field = name.partition(".")
    kind = schema.field(top).type if top in schema.names else None
    if field and kind is not None and pa.types.is_struct(kind) and kind.get_field_index(field) >= 0:
        return kind.field(field).type
    return None


def _missing(schema: pa.Schema, path: Path, option: str, what: str) -> DataError:
    shown = ", ".join(schema.names[:40]) + (", …" if len(schema.names) > 40 else "")
    return DataError(f"{path}: there is not {what}. It has the columns {shown}. Name the right one with `{option}`.")
