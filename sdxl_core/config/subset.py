"""Parameters of picking pictures, and of describing what was picked."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from pydantic import Field

from sdxl_core.sections import Extension, Section

SubsetHow = Literal["auto", "manifest", "copy", "hardlink", "reflink", "symlink"]


class SourceOptions(Section):
    recursive: bool = Field(True, description="look into sub-folders too")
    tag_extension: Extension = Field(".txt", description="tags of picture F.png are in F + this extension")
    caption_extension: Extension = Field(".caption", description="sentences about F.png are in F + this extension")


class SubsetOptions(Section):
    query: str = Field(
        "",
        title="Tag query",
        description="as booru sites write it: 1girl -comic width:>=768 score:>=10 ( pink_hair or blonde_hair ) *_ears; "
        "empty keeps every picture (docs/query.md)",
    )
    how: SubsetHow = Field(
        "auto",
        description="auto: manifest in a job, copy otherwise; manifest: a list that says where each picture is, "
        "nothing is copied; copy: files of their own, verified; hardlink: second names on the same file system; "
        "reflink: files that share blocks (btrfs, xfs); symlink: links that need the source to stay",
    )
    shard_size: int = Field(
        4_096, ge=1, description="copies and links are made in parallel shards of this many pictures"
    )


class SubsetConfig(SubsetOptions, SourceOptions):
    """Pick pictures by their tags and list, copy or link them, with their text files, in a new folder."""

    source: Path = Field(description="folder of pictures with text files beside them, or a catalog")
    out: Path = Field(description="folder that receives the subset")


class StatisticsConfig(Section):
    """Count the tags, sizes, ratings and caption lengths of the pictures that a query picks of a catalog."""

    source: Path = Field(description="a catalog")
    query: str = Field("", title="Tag query", description="which pictures; empty: all (docs/query.md)")
    out: Path = Field(description="folder that receives statistics.html and statistics.md")
