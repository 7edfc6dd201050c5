"""Parameters of making metadata JSONs."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from pydantic import Field

from sdxl_core.config.subset import SourceOptions
from sdxl_core.sections import Section

CleanStep = Literal["underscores", "repeated", "rating"]
Category = Literal[
    "artist", "character", "copyright", "general", "meta", "species", "lore", "quality", "special", "year", "rating"
]


class MergeTagsOptions(Section):
    clean: tuple[CleanStep, ...] = Field(
        (),
        description="what is changed in the tags: underscores (spaces instead, but ^_^ stays), repeated (each tag "
        "once), rating (a trailing rating is left out, with all behind it)",
    )
    category_order: tuple[Category, ...] = Field(
        ("artist", "character", "copyright", "general", "meta"),
        description="catalog: tags are written in this order of their categories; those not named follow",
    )
    drop_categories: tuple[Category, ...] = Field((), description="catalog: tags of these categories are left out")
    separator: str = Field(", ", min_length=1, description="catalog: what stands between two tags")
    key_style: Literal["relative", "full_path"] = Field(
        "relative",
        description="relative: path below the source without extension (the stem, in a flat folder); "
        "full_path: the path as given, as sd-scripts' --full_path writes it",
    )
    empty_tags: Literal["keep", "reject"] = Field(
        "keep", description="a picture whose text files are empty: keep it with an empty caption, or reject it"
    )
    num_shards: int = Field(
        8,
        ge=1,
        le=10_000,
        description="what is merged is cut into so many parallel shards; a folder into more where one would have over "
        "32,768 pictures",
    )


class MergeTagsConfig(MergeTagsOptions, SourceOptions):
    """Collect the tags and captions of a folder of pictures into one metadata JSON (meta_cap_dd.json)."""

    source: Path = Field(description="folder of pictures with text files beside them, or a catalog")
    manifest: Path | None = Field(None, description="catalog: only the pictures of this manifest, as subset makes it")
    out: Path = Field(description="metadata JSON to write; rejected.jsonl is written beside it")


class MergeJsonConfig(Section):
    """Join metadata JSONs, such as the shards of a meta_lat.json, into one."""

    sources: tuple[Path, ...] = Field(
        min_length=1, description="metadata JSONs, in order; of two entries with one key the first is used"
    )
    out: Path = Field(description="metadata JSON to write; rejected.jsonl is written beside it")
