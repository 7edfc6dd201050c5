"""Merge a catalog: its records as entries of the JSON, whole columns at a time."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from functools import cached_property
from json.encoder import encode_basestring_ascii as quoted
from pathlib import Path
from typing import Any

import numpy as np
import orjson
import pyarrow as pa
import pyarrow.compute as pc

from sdxl_core.catalog.records import CHUNK_RECORDS, Catalog
from sdxl_core.catalog.schema import CATEGORIES
from sdxl_core.config import MergeTagsConfig
from sdxl_core.dataset.text import normalise_tag
from sdxl_core.errors import ConfigError, DataError
from sdxl_core.files import digest_of, write_atomic
from sdxl_core.merge.clean import cleaned_text, ends_list, spelled
from sdxl_core.merge.shards import FORMAT, Counts, Piece, refuse, shard_is_merged, shard_path
from sdxl_core.refs import ShardRef
from sdxl_core.subset.manifest import Manifest

Ints = np.ndarray[Any, np.dtype[Any]]
RECORDS_A_PIECE = 8_192
_NEEDS_ESCAPE = r"[^ !#-\[\]-~]"  # anything but printable ASCII without " and \


def plan_records(config: MergeTagsConfig) -> list[ShardRef]:
    """Cut a catalog's records, or those of its manifest, into `num_shards` ranges. Raises: ConfigError, DataError."""
    catalog = Catalog.open(config.source)
    settings = config.model_dump_json(exclude={"out", "num_shards", "source", "manifest"})
    records = _manifest_records(config.manifest, catalog) if config.manifest else None
    num_records = catalog.num_records if records is None else len(records)
    picked = "" if records is None else hashlib.sha256(records.tobytes()).hexdigest()
    num_shards = min(config.num_shards, num_records)
    shards = []
    for index in range(num_shards):
        start, stop = (num_records * i // num_shards for i in (index, index + 1))
        digest = digest_of(FORMAT, settings, catalog.digest, picked, start, stop)
        shard = ShardRef(index=index, start=start, stop=stop, digest=digest, path=shard_path(config, digest))
        if not shard_is_merged(shard, config):
            body = {"catalog": str(config.source), "digest": catalog.digest, "start": start, "stop": stop}
            write_atomic(shard.path, orjson.dumps(body), sync=False)
        shards.append(shard)
    return shards


def pieces_of_records(config: MergeTagsConfig, stored: dict[str, Any], counts: Counts) -> Iterator[Piece]:
    """The entries of a range of records, in order."""
    catalog = Catalog.open(Path(stored["catalog"]))
    if catalog.digest != stored["digest"]:
        raise DataError(f"{stored['catalog']}: the catalog was changed while it was merged. Run the merge again.")
    picked = _manifest_records(config.manifest, catalog) if config.manifest else None
    writer = _EntryWriter(catalog, config)
    for start in range(stored["start"], stored["stop"], RECORDS_A_PIECE):
        stop = min(start + RECORDS_A_PIECE, stored["stop"])
        piece = writer.piece(np.arange(start, stop) if picked is None else picked[start:stop], counts)
        if piece.num_entries:
            yield piece
        if (start - stored["start"]) % CHUNK_RECORDS == 0:
            catalog.forget()


def _manifest_records(path: Path, catalog: Catalog) -> Ints:
    """The records of a manifest, 8 bytes each. Raises: ConfigError: it was made of another catalog, or is not there."""
    manifest = Manifest.open(path)
    if manifest.catalog_digest != catalog.digest:
        raise ConfigError(
            f"manifest = {path}: made of another state of the catalog {manifest.catalog}. Make the subset again, of "
            f"{catalog.path}."
        )
    chunks = [chunk["record"].to_numpy() for chunk in manifest.chunks(["record"])]
    return np.concatenate(chunks) if chunks else np.zeros(0, np.int64)


class _EntryWriter:
    """Turns records into JSON text. Everything that depends on the tag alone is done once a tag."""

    def __init__(self, catalog: Catalog, config: MergeTagsConfig) -> None:
        self._catalog, self._config = catalog, config
        self._roots = [source.path for source in catalog.sources]
        self._wants_images = catalog.knows_pictures

    @cached_property
    def _tags(self) -> list[str]:
        tags: list[str] = self._catalog.vocabulary["tag"].to_pylist()
        return tags

    @cached_property
    def _written(self) -> pa.Array:
        """Each tag as it stands in the JSON, escaped."""
        tags = self._catalog.vocabulary["tag"]
        if "underscores" in self._config.clean:
            tags = pa.array((spelled(tag, self._config.clean) for tag in self._tags), pa.string())
        return _escaped(tags)

    @cached_property
    def _ends(self) -> Ints:
        return np.fromiter((ends_list(tag, self._config.clean) for tag in self._tags), bool, len(self._tags))

    @cached_property
    def _same(self) -> Ints:
        """The lowest id among tags that compare equal."""
        first: dict[str, int] = {}
        return np.fromiter((first.setdefault(normalise_tag(tag), i) for i, tag in enumerate(self._tags)), np.int64)

    @cached_property
    def _ranks(self) -> Ints:
        """Place of each tag's category in the order asked for; those left out have -1."""
        order = [*self._config.category_order, *CATEGORIES]
        rank = [-1 if name in self._config.drop_categories else order.index(name) for name in CATEGORIES]
        ranks: Ints = np.asarray(rank, np.int16)[self._catalog.vocabulary["category"].to_numpy()]
        return ranks

    def piece(self, records: Ints, counts: Counts) -> Piece:
        columns = ["key", "tags", "raw_tags", "caption", "image", "source"]
        rows = self._catalog.take(records, columns)
        tags, captions = self._tag_texts(rows), _escaped(rows["caption"])
        keep = self._usable(rows, tags, counts)
        rows, tags, captions = rows.filter(keep), tags.filter(keep), captions.filter(keep)
        if not rows.num_rows:
            return Piece(b"", 0)
        fields = pc.binary_join_element_wise(
            pc.binary_join_element_wise('    "caption": "', captions, '"', ""),
            pc.binary_join_element_wise('    "tags": "', tags, '"', ""),
            ",\n",
            null_handling="skip",
        )
        entries = pc.binary_join_element_wise('  "', self._keys(rows), '": {\n', fields, "\n  }", "")
        joined = pc.binary_join(pa.ListArray.from_arrays(pa.array([0, len(entries)], pa.int32()), entries), ",\n")
        return Piece(joined[0].as_buffer().to_pybytes(), len(entries))

    def _usable(self, rows: pa.RecordBatch, tags: pa.Array, counts: Counts) -> pa.Array:
        """Which rows are written; what has no picture or no words is told."""
        has_words = pc.or_(pc.is_valid(tags), pc.is_valid(rows["caption"]))
        has_image = pc.is_valid(rows["image"]) if self._wants_images else pa.array(np.ones(rows.num_rows, bool))
        for kind, lacks in (
            ("image", pc.invert(has_image)),
            ("tags", pc.and_(has_image, pc.is_null(tags))),
            ("caption", pc.and_(has_image, pc.is_null(rows["caption"]))),
            ("text", pc.and_(has_image, pc.invert(has_words))),
        ):
            counts.missing[kind] += pc.sum(lacks).as_py() or 0
        empty = pc.and_(*(pc.equal(pc.fill_null(texts, ""), "") for texts in (tags, rows["caption"])))
        keep = pc.and_(has_words, has_image)
        if self._config.empty_tags == "reject":
            keep = pc.and_(keep, pc.invert(empty))
        out = pc.invert(keep)
        for key, words, image in zip(
            *(column.filter(out).to_pylist() for column in (rows["key"], has_words, has_image)), strict=True
        ):
            if not image:
                counts.rejected.append(refuse(key, "no_image", "it has words, and none of the sources has its picture"))
            elif not words:
                counts.rejected.append(refuse(key, "no_caption", "none of the sources has tags or a caption for it"))
            else:
                counts.rejected.append(refuse(key, "empty_caption", "its tags and caption are empty"))
        counts.num_empty += pc.sum(pc.and_(keep, empty)).as_py() or 0
        return keep

    def _tag_texts(self, rows: pa.RecordBatch) -> pa.Array:
        """The tags of each row as one escaped text, null where nothing is known of them."""
        lists = rows["tags"]
        lengths = np.asarray(pc.fill_null(pc.list_value_length(lists), 0))
        row, ids = np.repeat(np.arange(len(lists)), lengths), lists.flatten().to_numpy()
        row, ids = self._ordered(row, ids)
        offsets = np.zeros(len(lists) + 1, np.int32)
        np.cumsum(np.bincount(row, minlength=len(lists)), out=offsets[1:])
        texts = pc.binary_join(
            pa.ListArray.from_arrays(pa.array(offsets), self._written.take(pa.array(ids))),
            quoted(self._config.separator)[1:-1],
        )
        texts = pc.if_else(pc.is_valid(lists), texts, None)
        raw = rows["raw_tags"]
        if raw.null_count < len(raw):
            if self._config.clean or self._config.separator != ", ":
                raw = pa.array([None if text is None else self._cleaned(text) for text in raw.to_pylist()], pa.string())
            texts = pc.coalesce(_escaped(raw), texts)
        return texts

    def _cleaned(self, text: str) -> str:
        return cleaned_text(text, self._config.clean, self._config.separator)

    def _ordered(self, row: Ints, ids: Ints) -> tuple[Ints, Ints]:
        """Categories in their order, what is dropped or cleaned away left out."""
        ranks = self._ranks[ids]
        if (ranks < 0).any():
            row, ids, ranks = row[ranks >= 0], ids[ranks >= 0], ranks[ranks >= 0]
        if (np.diff(row * 64 + ranks) < 0).any():
            order = np.argsort(row * 64 + ranks, kind="stable")
            row, ids = row[order], ids[order]
        if "rating" in self._config.clean and len(ids):
            ended = np.cumsum(self._ends[ids])
            starts = np.searchsorted(row, row)  # first place of the row
            before = np.where(starts > 0, ended[starts - 1], 0)
            keep = ended == before
            row, ids = row[keep], ids[keep]
        if "repeated" in self._config.clean and len(ids):
            _, first = np.unique(row * len(self._same) + self._same[ids], return_index=True)
            first.sort()
            row, ids = row[first], ids[first]
        return row, ids

    def _keys(self, rows: pa.RecordBatch) -> pa.Array:
        if self._config.key_style == "relative":
            return _escaped(rows["key"])
        names = rows["image"].to_pylist()
        sources = rows["source"].to_pylist()
        keys = rows["key"].to_pylist()
        full = [
            key if name is None else f"{self._roots[source]}/{name}"
            for key, name, source in zip(keys, names, sources, strict=True)
        ]
        return _escaped(pa.array(full, pa.string()))


def _escaped(texts: pa.Array) -> pa.Array:
    """Texts as JSON writes them between quotes, non-ASCII escaped."""
    odd = pc.fill_null(pc.match_substring_regex(texts, _NEEDS_ESCAPE), False)
    if not pc.any(odd).as_py():
        return texts
    escaped = pa.array([quoted(text)[1:-1] for text in texts.filter(odd).to_pylist()], pa.string())
    return pc.replace_with_mask(texts, odd, escaped)
