"""Merge a folder: which text files there are, and the entries they make."""

from __future__ import annotations

import codecs
import os
from array import array
from collections.abc import Container, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import chain
from json.encoder import encode_basestring_ascii as quoted
from typing import Any

import numpy as np
import orjson

from sdxl_core.config import MergeTagsConfig
from sdxl_core.dataset import forked
from sdxl_core.dataset.listing import NameListing, key_of, keys_of, list_names
from sdxl_core.dataset.text import UnreadableText, state_of
from sdxl_core.errors import DataError
from sdxl_core.files import digest_of, write_atomic
from sdxl_core.merge.clean import cleaned_text
from sdxl_core.merge.shards import (
    FORMAT,
    STAGE,
    Counts,
    Piece,
    fragment_path,
    refuse,
    remember,
    shard_is_merged,
    shard_path,
    work_folder,
    write_fragment,
)
from sdxl_core.merge.texts import Texts
from sdxl_core.refs import MergeShardRef, ShardRef

ENTRIES_A_WRITE = 256  # more only fills memory
IMAGES_A_SHARD = 32_768
MIN_IMAGES_A_PROCESS = 2_000  # below, a fork costs more than it saves (benchmarks/merge_tags.md)


def plan_folder(config: MergeTagsConfig) -> list[ShardRef]:
    """List the pictures and cut them into contiguous shards, as many as `num_parts` says.

    A shard's digest covers the names of its pictures, the sizes and times of their text files, and the settings; not
    the pictures themselves, which merging does not open.
    Raises: ConfigError, DataError.
    """
    listing = list_folder(config)
    num_shards = num_parts(listing, config)
    plan = partial(_plan_shard, config=config, listing=listing, num_shards=num_shards)
    count = forked.num_processes(min(num_shards, len(listing.names) // MIN_IMAGES_A_PROCESS))
    return list(forked.map_forked(plan, range(num_shards), count=count))


def num_parts(listing: NameListing, config: MergeTagsConfig) -> int:
    """How many shards a listing is cut into: a shard's names are held as text by the process that works on it."""
    num_images = len(listing.names)
    return min(num_images, max(config.num_shards, -(-num_images // IMAGES_A_SHARD)))


def list_folder(config: MergeTagsConfig) -> NameListing:
    """The pictures and text files. Raises: ConfigError.   DataError: no picture that can be used."""
    extensions = (config.tag_extension, config.caption_extension)
    listing = list_names(config.source, recursive=config.recursive, stage=STAGE, text_extensions=extensions)
    if not len(listing.names):
        raise DataError(
            f"{config.source}: every picture was rejected, the first: {listing.rejected[0].key}: "
            f"{listing.rejected[0].detail}."
        )
    return listing


def _plan_shard(index: int, *, config: MergeTagsConfig, listing: NameListing, num_shards: int) -> ShardRef:
    """Look at the shard's text files and store its rows, unless they are merged already."""
    part = _Part.of(listing, index, num_shards, config)
    columns = part.columns(
        *(
            _text_states(config.source, part.names, listing.may_have(part.names, extension), extension)
            for extension in (config.tag_extension, config.caption_extension)
        )
    )
    shard, body = _shard(config, part, columns)
    if not shard_is_merged(shard, config) and not (shard.path.exists() and shard.path.read_bytes() == body):
        write_atomic(shard.path, body, sync=False)
    return shard


def merge_part(index: int, *, config: MergeTagsConfig, listing: NameListing, num_shards: int) -> MergeShardRef:
    """Plan and merge a shard in one go: the state of a text file is asked of the file that is open for reading.

    What is left behind is what `plan_folder` and `merge_shard` leave. For a first run, when no shard can be finished.
    Raises: DiskFullError, DataError.
    """
    part, counts = _Part.of(listing, index, num_shards, config), Counts()
    tags, captions = (
        Texts(config.source, extension, listing.may_have(part.names, extension), states=array("q"))
        for extension in (config.tag_extension, config.caption_extension)
    )
    counts.rejected += [refuse(*row) for row in part.rejected]
    counts.missing["image"] += part.num_lonely
    path = work_folder(config) / f"first.{index}.fragment"
    written = write_fragment(path, _pieces(config, part.names, tags, captions, counts))
    assert tags.states is not None and captions.states is not None
    shard, _ = _shard(config, part, part.columns(tags.states, captions.states))
    os.replace(path, fragment_path(shard))
    return remember(shard, written, counts)


@dataclass(frozen=True, slots=True)
class _Part:
    """A contiguous part of a listing. The first has what belongs to none.

    `rejected`: key, reason and detail of the listing's rejections.   `num_lonely`: texts without a picture.
    """

    index: int
    start: int
    names: list[str]
    rejected: list[tuple[str, str, str]]
    num_lonely: int

    @classmethod
    def of(cls, listing: NameListing, index: int, num_parts: int, config: MergeTagsConfig) -> _Part:
        start, stop = (len(listing.names) * i // num_parts for i in (index, index + 1))
        rejected = [(row.key, row.reason, row.detail) for row in listing.rejected] if index == 0 else []
        num_lonely = _num_lonely(listing, (config.tag_extension, config.caption_extension)) if index == 0 else 0
        return cls(index, start, listing.names.part(start, stop), rejected, num_lonely)

    def columns(self, tags: array[int], captions: array[int]) -> dict[str, Any]:
        return {
            "names": self.names,
            "tags": np.frombuffer(tags, np.int64),
            "captions": np.frombuffer(captions, np.int64),
            "rejected": self.rejected,
            "num_lonely": self.num_lonely,
        }


def _num_lonely(listing: NameListing, extensions: Sequence[str]) -> int:
    """How many text files are no picture's. 64-bit hashes are compared, which hold 16 bytes a picture for a moment."""
    texts, names = listing.text_names, listing.names
    ends = [end for end in dict.fromkeys(extensions) if any(text.endswith(end) for text in texts)]
    theirs = (hash(key_of(name) + end) for end in ends for name in names)
    hashes = np.fromiter(chain(map(hash, texts), theirs), np.int64, len(texts) + len(ends) * len(names))
    hashes.sort()
    return len(texts) - int(np.count_nonzero(hashes[1:] == hashes[:-1]))


def _shard(config: MergeTagsConfig, part: _Part, columns: dict[str, Any]) -> tuple[ShardRef, bytes]:
    """A shard, named by the digest of its rows and of the settings, and its rows."""
    body = orjson.dumps(columns, option=orjson.OPT_SERIALIZE_NUMPY)
    digest = digest_of(FORMAT, config.model_dump_json(exclude={"out", "num_shards"}), body)
    stop = part.start + len(part.names)
    return (
        ShardRef(index=part.index, start=part.start, stop=stop, digest=digest, path=shard_path(config, digest)),
        body,
    )


def _text_states(source: os.PathLike[str], names: Sequence[str], there: Sequence[bool], extension: str) -> array[int]:
    """Size in bytes and mtime_ns of each picture's text file, one after the other; -1, -1 where there is none."""
    prefix, stat = os.path.join(source, ""), os.stat
    numbers = array("q")
    if not any(there):
        numbers.extend((-1, -1) * len(names))
        return numbers
    for key, may_be in zip(keys_of(names), there, strict=True):
        try:
            status = stat(prefix + key + extension) if may_be else None
        except FileNotFoundError:
            status = None
        except OSError:
            numbers.extend((0, 0))  # the merge meets the same failure and rejects the picture
            continue
        numbers.extend(state_of(status) if status else (-1, -1))
    return numbers


def pieces_of_folder(config: MergeTagsConfig, stored: dict[str, Any], counts: Counts) -> Iterator[Piece]:
    """The entries of a stored listing, in its order."""
    counts.rejected += [refuse(key, reason, detail) for key, reason, detail in stored["rejected"]]
    counts.missing["image"] += stored["num_lonely"]
    tags, captions = (
        Texts(config.source, extension, [size >= 0 for size in stored[kind][::2]])
        for kind, extension in (("tags", config.tag_extension), ("captions", config.caption_extension))
    )
    yield from _pieces(config, stored["names"], tags, captions, counts)


def _pieces(
    config: MergeTagsConfig, names: Sequence[str], tags: Texts, captions: Texts, counts: Counts
) -> Iterator[Piece]:
    """The entries of pictures, in their order; what has none goes into `counts`."""
    prefix = str(config.source / "x")[:-1] if config.key_style == "full_path" else None
    for start in range(0, len(names), ENTRIES_A_WRITE):
        some = names[start : start + ENTRIES_A_WRITE]
        keys = keys_of(some)
        failures: dict[str, UnreadableText | OSError] = {}
        sentences, lists = captions.read(keys, failures), tags.read(keys, failures)
        _count_missing(keys, lists, sentences, failures, counts)
        rows = zip(some, keys, sentences, lists, strict=True)
        if not (failures or config.clean) and sentences.count(None) == len(lists) and "" not in lists:
            tagged: list[tuple[str, str]] = []
            for name, key, _, tag_text in rows:
                if tag_text is None:
                    _entry(config, name, key, None, None, None, counts)
                else:
                    tagged.append((key if prefix is None else prefix + name, tag_text))
            if tagged:
                yield Piece(tags_text(tagged), len(tagged))
            continue
        entries: dict[str, dict[str, str]] = {}
        for name, key, caption, tag_text in rows:
            if entry := _entry(config, name, key, caption, tag_text, failures.get(key), counts):
                entries[key if prefix is None else prefix + name] = entry
        if entries:
            yield Piece(entries_text(entries), len(entries))


def _count_missing(
    keys: Sequence[str],
    tags: Sequence[str | None],
    captions: Sequence[str | None],
    failures: Container[str],
    counts: Counts,
) -> None:
    """Count the pictures that lack a text; not those whose text cannot be read."""
    if failures:
        rows = zip(keys, tags, captions, strict=True)
        read = [(tag_text, caption) for key, tag_text, caption in rows if key not in failures]
        tags, captions = [tag_text for tag_text, _ in read], [caption for _, caption in read]
    num_untagged, num_wordless = tags.count(None), captions.count(None)
    counts.missing["tags"] += num_untagged
    counts.missing["caption"] += num_wordless
    if num_wordless == len(captions):  # the usual folder has none
        counts.missing["text"] += num_untagged
    elif num_untagged and num_wordless:
        counts.missing["text"] += sum(a is None and b is None for a, b in zip(tags, captions, strict=True))


def _entry(
    config: MergeTagsConfig,
    name: str,
    key: str,
    caption: str | None,
    tags: str | None,
    failure: UnreadableText | OSError | None,
    counts: Counts,
) -> dict[str, str] | None:
    """A picture's entry, or None and why there is none goes into `counts`."""
    if isinstance(failure, UnreadableText):
        counts.rejected.append(refuse(key, failure.reason, str(failure)))
        return None
    if failure is not None:
        counts.num_failed_reads += 1
        counts.rejected.append(refuse(key, "unreadable_text", f"its text file cannot be read: {failure.strerror}"))
        return None
    if tags is None and caption is None:
        short = os.path.basename(key)
        detail = f"there is no {short}{config.tag_extension} or {short}{config.caption_extension} beside {name}"
        counts.rejected.append(refuse(key, "no_caption", detail))
        return None
    if tags and config.clean:
        tags = cleaned_text(tags, config.clean)
    if not (tags or caption):
        if config.empty_tags == "reject":
            counts.rejected.append(refuse(key, "empty_caption", "its text files are empty"))
            return None
        counts.num_empty += 1
    return {field: text for field, text in (("caption", caption), ("tags", tags)) if text is not None}


def entries_text(entries: dict[str, dict[str, str]]) -> bytes:
    """Entries as `json.dumps(indent=2)` writes them in a larger object, ASCII only."""
    text = orjson.dumps(entries, option=orjson.OPT_INDENT_2)[2:-2]
    if not text.isascii():
        text = text.decode().encode("ascii", "json-escapes")
    return text.replace(b"\x7f", b"\\u007f")


def tags_text(rows: Sequence[tuple[str, str]]) -> bytes:
    """As `entries_text` of keys and tags, at a third of its cost: one text with DEL, which nobody writes, between."""
    texts = [text for row in rows for text in row]
    others = [] if "".join(texts).isascii() else [place for place, text in enumerate(texts) if not text.isascii()]
    escaped = [quoted(texts[place])[1:-1].encode() for place in others]
    for place in others:
        texts[place] = ""
    parts = orjson.dumps("\x7f".join(texts))[1:-1].split(b"\x7f")
    if len(parts) != len(texts):
        return entries_text({key: {"tags": tags} for key, tags in rows})
    for place, text in zip(others, escaped, strict=True):
        parts[place] = text
    entries = map(b'": {\n    "tags": "'.join, zip(parts[::2], parts[1::2], strict=True))
    return b'  "%s"\n  }' % b'"\n  },\n  "'.join(entries)


def _json_escapes(error: UnicodeError) -> tuple[str, int]:
    assert isinstance(error, UnicodeEncodeError)
    return quoted(error.object[error.start : error.end])[1:-1], error.end


codecs.register_error("json-escapes", _json_escapes)
