"""What a catalog is made of."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

from pydantic import Field, field_validator, model_validator

from sdxl_core.catalog.words import CATEGORIES, RATING_CODES
from sdxl_core.sections import Extension, Section

Kind = Literal["auto", "folder", "parquet", "tars", "json", "jsonl"]
Use = Literal["images", "facts", "tags", "captions"]
Sizes = Literal["auto", "read", "skip"]


class CatalogSource(Section):
    """One place that says something about pictures."""

    path: Path = Field(
        description="folder of pictures, folder of tar shards, parquet file or folder of them, .json or .jsonl"
    )
    kind: Kind = Field(
        "auto", description="auto looks at the path: tars and parquet files by their ending, else a folder"
    )
    prefix: str = Field("", description="goes before every key: danbooru/ makes danbooru/123 of 123")
    use: tuple[Use, ...] = Field(
        ("images", "facts", "tags", "captions"), min_length=1, description="what is taken from this source"
    )
    key: Literal["path", "name"] = Field(
        "path",
        description="folder, tars: what names a picture. path: sub-folders and name, so that 0123/5123.webp is "
        "0123/5123; name: the name alone, as where pictures are spread over sub-folders by their id",
    )
    recursive: bool = Field(True, description="folder: look into sub-folders too")
    tag_extension: Extension = Field(
        ".txt", description="folder, tars: tags of picture F.png are in F + this extension"
    )
    caption_extension: Extension = Field(
        ".caption", description="folder, tars: sentences about F.png are in F + this extension"
    )
    id_column: str = Field("", description="parquet: column of the post id; empty: id, else the pandas index")
    tag_columns: dict[str, str] = Field(
        {},
        description="parquet: category = column, such as {artist = 'tag_string_artist'}, or a field of a struct as "
        "'tags.artist'; category '' is unknown; empty: what booru dumps call them",
    )
    caption_columns: tuple[str, ...] = Field(
        ("caption",),
        description="parquet, json, jsonl: sentence columns that are joined by a space; those not there are left out",
    )
    ratings: tuple[str, ...] = Field(
        (),
        description="parquet, json, jsonl: pictures that it gives another rating than these, such as g, s, or none, "
        "leave the catalog, whichever source has their files; empty: all stay",
    )
    root_map: dict[str, str] = Field(
        {},
        description='json, jsonl: what keys begin with, and what stands for it: {"H:/just_astolfo/" = ""} makes '
        "H:/just_astolfo/1.png the key 1",
    )

    @field_validator("tag_columns")
    @classmethod
    def categories_are_known(cls, columns: dict[str, str]) -> dict[str, str]:
        unknown = columns.keys() - set(CATEGORIES)
        if unknown:
            raise ValueError(f"{min(unknown)!r} is no category; they are {', '.join(CATEGORIES[1:])}, and '' for none")
        return columns

    @field_validator("ratings")
    @classmethod
    def ratings_are_known(cls, ratings: tuple[str, ...]) -> tuple[str, ...]:
        unknown = set(ratings) - (RATING_CODES.keys() - {""})
        if unknown:
            raise ValueError(f"{min(unknown)!r} is no rating; they are g, s, q, e")
        return ratings

    @field_validator("prefix")
    @classmethod
    def prefix_stays_inside(cls, prefix: str) -> str:
        if prefix.startswith("/") or ".." in prefix.split("/") or "\\" in prefix or "\0" in prefix:
            raise ValueError("is put before keys: a relative path such as danbooru/")
        return prefix


class CatalogConfig(Section):
    """Describe any number of pictures, from any number of sources, in one memory-mapped table."""

    sources: tuple[CatalogSource, ...] = Field(
        min_length=1,
        description="folders of pictures, folders of tars, parquet, json or jsonl, in order: where two say the same, "
        "the first counts. PREFIX/=PATH, such as danbooru/=/data/dan, puts danbooru/ before the keys of that path",
    )
    out: Path = Field(description="folder of the catalog")
    index: bool = Field(True, description="make the index that answers queries at once; about 130 bytes a picture")
    sizes: Sizes = Field(
        "auto",
        description="folders, tars: width and height, where no source tells them, from the pictures' headers; auto: "
        "once, when a query or statistics asks for them; read: of all pictures, while the catalog is made; skip: never",
    )
    processes: int = Field(0, ge=0, le=256, description="processes that read the sources; 0: one a core")

    @field_validator("sources", mode="before")
    @classmethod
    def sources_may_be_paths(cls, sources: Any) -> Any:
        """A source may be given as PATH or as PREFIX/=PATH."""
        return [_from_text(source) if isinstance(source, str | Path) else source for source in sources]

    @model_validator(mode="after")
    def sources_differ(self) -> CatalogConfig:
        seen = set()
        for source in self.sources:
            place = (source.path, source.prefix, source.use)
            if place in seen:
                raise ValueError(f"sources: {source.path} is listed twice with the same prefix")
            seen.add(place)
        return self


def _from_text(source: str | Path) -> dict[str, str]:
    prefix, equals, path = str(source).partition("=")
    if equals and prefix.endswith("/") and not prefix.startswith(("/", ".", "~")):
        return {"prefix": prefix, "path": path}
    return {"path": str(source)}
