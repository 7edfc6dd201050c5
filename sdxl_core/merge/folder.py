"""Merge a folder: which text files there are, and the entries they make."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from functools import partial
from itertools import islice
from json.encoder import encode_basestring_ascii as quoted
from typing import Any

import orjson

from sdxl_core.config import MergeTagsConfig
from sdxl_core.dataset import forked
from sdxl_core.dataset.listing import NameListing, key_of, list_names
from sdxl_core.dataset.text import UnreadableText, read_text
from sdxl_core.errors import DataError
from sdxl_core.files import digest_of, write_atomic
from sdxl_core.merge.clean import cleaned_text
from sdxl_core.merge.shards import FORMAT, STAGE, Counts, Piece, refuse, shard_is_merged, shard_path
from sdxl_core.refs import ShardRef

ENTRIES_A_WRITE = 256  # more only fills memory
MIN_IMAGES_A_PROCESS = 2_000  # below, a fork costs more than it saves (benchmarks/merge_tags.md)


def plan_folder(config: MergeTagsConfig) -> list[ShardRef]:
    """List the pictures and cut them into at most `num_shards` contiguous shards.

    A shard's digest covers the names of its pictures, the sizes and times of their text files, and the settings; not
    the pictures themselves, which merging does not open.
    Raises: ConfigError, DataError.
    """
    extensions = (config.tag_extension, config.caption_extension)
    listing = list_names(config.source, recursive=config.recursive, stage=STAGE, text_extensions=extensions)
    if not listing.names:
        raise DataError(
            f"{config.source}: every picture was rejected, the first: {listing.rejected[0].key}: "
            f"{listing.rejected[0].detail}."
        )
    settings = config.model_dump_json(exclude={"out", "num_shards"})
    num_shards = min(config.num_shards, len(listing.names))
    plan = partial(_plan_shard, config=config, listing=listing, settings=settings, num_shards=num_shards)
    count = forked.num_processes(min(num_shards, len(listing.names) // MIN_IMAGES_A_PROCESS))
    return list(forked.map_forked(plan, range(num_shards), count=count))


def _plan_shard(
    index: int, *, config: MergeTagsConfig, listing: NameListing, settings: str, num_shards: int
) -> ShardRef:
    """Look at the shard's text files and store its rows, unless they are merged already."""
    start, stop = (len(listing.names) * i // num_shards for i in (index, index + 1))
    keys = listing.keys[start:stop]
    columns = {
        "names": listing.names[start:stop],
        "tags": _text_stats(config.source, keys, listing.texts, config.tag_extension),
        "captions": _text_stats(config.source, keys, listing.texts, config.caption_extension),
        "rejected": [[row.key, row.reason, row.detail] for row in listing.rejected] if index == 0 else [],
    }
    body = orjson.dumps(columns)
    digest = digest_of(FORMAT, settings, body)
    shard = ShardRef(index=index, start=start, stop=stop, digest=digest, path=shard_path(config, digest))
    if not shard_is_merged(shard, config) and not (shard.path.exists() and shard.path.read_bytes() == body):
        write_atomic(shard.path, body, sync=False)
    return shard


def _text_stats(source: os.PathLike[str], keys: Sequence[str], texts: frozenset[str], extension: str) -> list[int]:
    """Size in bytes and mtime_ns of each picture's text file, one after the other; -1, -1 where there is none."""
    prefix, stat = os.path.join(source, ""), os.stat
    numbers: list[int] = []
    for key in keys:
        text = key + extension
        if text not in texts:
            numbers += (-1, -1)
            continue
        try:
            status = stat(prefix + text)
        except FileNotFoundError:
            numbers += (-1, -1)
        except OSError:
            numbers += (0, 0)  # the merge meets the same failure and rejects the picture
        else:
            numbers += (status.st_size, status.st_mtime_ns)
    return numbers


def pieces_of_folder(config: MergeTagsConfig, stored: dict[str, Any], counts: Counts) -> Iterator[Piece]:
    """The entries of a stored listing, in its order."""
    counts.rejected += [refuse(key, reason, detail) for key, reason, detail in stored["rejected"]]
    entries = _entries(config, stored, counts)
    while batch := list(islice(entries, ENTRIES_A_WRITE)):
        yield Piece(",\n".join(batch).encode("ascii"), len(batch))


def _entries(config: MergeTagsConfig, stored: dict[str, Any], counts: Counts) -> Iterator[str]:
    """Read the text files of a stored listing, in its order: entries as JSON text; the rest goes into `counts`."""
    full_path, spelled = config.key_style == "full_path", str(config.source / "x")[:-1]
    base = os.path.join(config.source, "")
    sizes = stored["tags"][::2], stored["captions"][::2]
    for name, tags_size, caption_size in zip(stored["names"], *sizes, strict=True):
        key = key_of(name)
        caption = tags = None
        try:
            if caption_size >= 0:
                caption = read_text(base + key + config.caption_extension)
            if tags_size >= 0:
                tags = read_text(base + key + config.tag_extension)
        except UnreadableText as error:
            counts.rejected.append(refuse(key, error.reason, str(error)))
            continue
        except OSError as error:
            counts.num_failed_reads += 1
            detail = f"its text file cannot be read: {error.strerror}"
            counts.rejected.append(refuse(key, "unreadable_text", detail))
            continue
        if tags and config.clean:
            tags = cleaned_text(tags, config.clean)
        if not (tags or caption):
            if tags is None and caption is None:
                short = os.path.basename(key)
                detail = f"there is no {short}{config.tag_extension} or {short}{config.caption_extension} beside {name}"
                counts.rejected.append(refuse(key, "no_caption", detail))
                continue
            if config.empty_tags == "reject":
                counts.rejected.append(refuse(key, "empty_caption", "its text files are empty"))
                continue
            counts.num_empty += 1
        fields = f'    "tags": {quoted(tags)}' if tags is not None else ""
        if caption is not None:
            fields = f'    "caption": {quoted(caption)}' + (",\n" + fields if fields else "")
        yield f"  {quoted(spelled + name if full_path else key)}: {{\n{fields}\n  }}"
