"""Build a catalog: cut the sources into parts, read each part once, join them."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import replace
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import orjson
import pyarrow as pa
import pyarrow.compute as pc

from sdxl_core.catalog.config import CatalogConfig, CatalogSource
from sdxl_core.catalog.join import GROUPS, Joined, join_rows, keys_of, part_starts
from sdxl_core.catalog.mapped import open_arrow, write_arrow
from sdxl_core.catalog.parts import Part, PartWriter, left_out_path, rows_path, vocab_path
from sdxl_core.catalog.records import MANIFEST, Catalog, joined_path
from sdxl_core.catalog.schema import FORMAT, VOCABULARY
from sdxl_core.catalog.sizes import has_all_sizes, has_headers, num_sized, read_part_sizes
from sdxl_core.catalog.sources import check_sources, reader_of, resolved
from sdxl_core.catalog.sources.base import STAGE, rejected
from sdxl_core.dataset import forked
from sdxl_core.errors import DataError
from sdxl_core.files import digest_of, remove_stale_partials, write_atomic
from sdxl_core.lock import output_lock
from sdxl_core.progress import Progress, no_progress
from sdxl_core.refs import CatalogPartRef, CatalogPlanRef, CatalogRef, to_json
from sdxl_core.rejected import Rejected, read_rejected, write_rejected

RUN_OF_PARTS = 16

Ints = np.ndarray[Any, np.dtype[Any]]


def build_catalog(config: CatalogConfig, *, progress: Progress = no_progress) -> CatalogRef:
    """Read all sources into `config.out`; what is read already and has not changed is not read again.

    Raises: ConfigError: a source that is not there.   DataError: a source that cannot be understood, or nothing in it.
    DiskFullError.
    """
    plans = plan_catalog(config)
    count = forked.num_processes(min(config.processes or len(os.sched_getaffinity(0)), len(plans)))
    parts: list[CatalogPartRef] = []
    run = max(1, min(RUN_OF_PARTS, len(plans) // count))  # neighbours of one process: see sources/parquet.py
    for part in forked.map_forked(partial(build_part, config=config), plans, count=count, run=run):
        parts.append(part)
        progress(STAGE, len(parts), len(plans), part.path.name[:8])
    return join_catalog(config, parts, progress=progress)


def plan_catalog(config: CatalogConfig) -> list[CatalogPlanRef]:
    """What there is to read, in parts. Raises: ConfigError, DataError."""
    work = config.out / "parts"
    check_sources(config.sources)
    plans: list[CatalogPlanRef] = []
    for number, source in enumerate(config.sources):
        source = resolved(source)
        settings = source.model_dump_json(exclude={"path"}) + ("takes out" if source.ratings else "")
        for piece in reader_of(source).plan(source, work):
            digest = digest_of(FORMAT, settings, piece.digest)
            plans.append(
                CatalogPlanRef(index=len(plans), source=number, digest=digest, label=piece.label, payload=piece.payload)
            )
            if piece.listing and _finished_rows(plans[-1], config) is None:
                write_atomic(Path(piece.payload["listing"]), piece.listing, sync=False)
    return plans


def build_part(plan: CatalogPlanRef, config: CatalogConfig) -> CatalogPartRef:
    """Read one part; what is finished of it is not read. Raises: DataError, DiskFullError."""
    part = _finished_rows(plan, config) or _read_rows(plan, config)
    source = resolved(config.sources[plan.source])
    if config.sizes == "read" and has_headers(source):
        read_part_sizes(Part(part.path), source)
    return part


def finished_part(plan: CatalogPlanRef, config: CatalogConfig) -> CatalogPartRef | None:
    """The part as it was left, None where there is something to read."""
    part = _finished_rows(plan, config)
    if part is None or config.sizes != "read":
        return part
    return part if has_all_sizes(Part(part.path), resolved(config.sources[plan.source])) else None


def _read_rows(plan: CatalogPlanRef, config: CatalogConfig) -> CatalogPartRef:
    source = resolved(config.sources[plan.source])
    path = _part_path(config.out, plan.digest)
    with PartWriter(path, use=source.use) as writer:
        refused = reader_of(source).read(source, plan.payload, writer)
    write_rejected(_rejected_path(path), refused)
    ref = CatalogPartRef(
        index=plan.index,
        source=plan.source,
        digest=plan.digest,
        path=path,
        num_seen=writer.num_rows + writer.num_filtered + len(refused),
        num_kept=writer.num_rows,
        num_filtered=writer.num_filtered,
        num_rejected=len(refused),
    )
    sizes = [file.stat().st_size for file in _files(ref)]
    write_atomic(_result_path(path), orjson.dumps({"ref": to_json(ref), "sizes": sizes}))
    pa.default_memory_pool().release_unused()  # or what many parts left free in pieces adds up
    return ref


def _finished_rows(plan: CatalogPlanRef, config: CatalogConfig) -> CatalogPartRef | None:
    """The part as it was left, None where a file of its rows is missing or has another size."""
    path = _part_path(config.out, plan.digest)
    try:
        stored = orjson.loads(_result_path(path).read_bytes())
        ref = CatalogPartRef(**{**stored["ref"], "index": plan.index, "source": plan.source, "path": path})
        if [file.stat().st_size for file in _files(ref)] != stored["sizes"]:
            return None
    except (FileNotFoundError, orjson.JSONDecodeError):
        return None
    return ref


def join_catalog(
    config: CatalogConfig, parts: Sequence[CatalogPartRef], *, progress: Progress = no_progress
) -> CatalogRef:
    """Make one catalog of finished parts, and its index where that is asked for. Raises: as `_join`."""
    ref = _join(config, parts)
    if config.index:
        from sdxl_core.query.index import build_index

        build_index(Catalog.open(config.out), progress=progress)
    return replace(ref, num_sized=num_sized(Catalog.open(config.out))) if config.sizes == "read" else ref


def _join(config: CatalogConfig, parts: Sequence[CatalogPartRef]) -> CatalogRef:
    """Make one catalog of finished parts; what an earlier state had and this one has not is removed.

    Raises: DataError: no row at all.   LockedError: another process joins this catalog just now.   DiskFullError.
    """
    if not any(part.num_kept for part in parts):
        raise DataError(
            f"{', '.join(str(source.path) for source in config.sources)}: nothing usable in "
            f"{sum(part.num_seen for part in parts)} rows; {_first_rejection(parts)}"
        )
    settings = [resolved(source).model_dump(mode="json") for source in config.sources]
    identity = digest_of(FORMAT, orjson.dumps(settings), *(f"{part.source}:{part.digest}" for part in parts))
    with output_lock(config.out, purpose="joins a catalog"):
        with suppress(FileNotFoundError, orjson.JSONDecodeError, KeyError):
            stored = orjson.loads((config.out / MANIFEST).read_bytes())
            if stored["digest"] == identity and _is_whole(config.out, stored):
                if stored.get("sizes") != config.sizes:
                    _write_manifest(config.out, stored | {"sizes": config.sizes})
                return _ref(config.out, stored)
        remove_stale_partials(config.out, name="*", recursive=True)
        opened = [Part(part.path) for part in parts]
        left_out = [Part(left_out_path(part.path)) for part in parts if part.num_filtered]
        joined = join_rows(opened, [part.source for part in parts], left_out)
        if not joined.num_records:
            filters = ", ".join(str(source.path) for source in config.sources if source.ratings)
            raise DataError(
                f"{filters}: `ratings` leave out every one of the {joined.num_taken_out:,} pictures that the sources "
                f"tell of. Name more ratings, or take the setting away."
            )
        _write_joined(config.out, identity, opened, joined)
        rows = _rejections(parts, config.sources, opened, joined)
        num_rejected = write_rejected(config.out / "rejected.jsonl", rows)
        stored = {
            "format": FORMAT,
            "digest": identity,
            "sources": settings,
            "parts": [{"digest": part.digest[:32], "source": part.source} for part in parts],
            "num_records": joined.num_records,
            "joined": identity,
            "has_pointers": joined.pointers is not None,
            "sizes": config.sizes,
            "num_seen": sum(part.num_seen for part in parts),
            "num_filtered": sum(part.num_filtered for part in parts) + joined.num_rows_taken_out,
            "num_taken_out": joined.num_taken_out,
            "num_rejected": num_rejected,
            "conflicts": joined.num_conflicts,
            "missing": _missing(opened, joined),
        }
        _write_manifest(config.out, stored)
        _remove_old(config.out, stored)
        return _ref(config.out, stored)


def _write_manifest(out: Path, stored: dict[str, Any]) -> None:
    write_atomic(out / MANIFEST, orjson.dumps(stored, option=orjson.OPT_INDENT_2))


def _write_joined(out: Path, identity: str, parts: Sequence[Part], joined: Joined) -> None:
    """The vocabulary over all parts, each part's tags as positions in it, and the rows of every record."""
    spelled, ids = _unified(parts)
    maps = [piece.values.to_numpy() for piece in ids]
    split = pc.split_pattern(spelled, "\0", max_splits=1)
    counts = np.zeros(len(spelled), np.int64)
    for part, tags in zip(parts, maps, strict=True):
        counts[tags] += part.vocabulary["count"].to_numpy()
        part.forget()
    if joined.pointers is not None:
        counts = _counts_of(parts, maps, joined.pointers["tags"], len(spelled))
    vocabulary = pa.RecordBatch.from_arrays(
        [
            pc.list_element(split, 1) if len(spelled) else spelled,
            pc.list_element(split, 0).cast(pa.uint8()) if len(spelled) else pa.array([], pa.uint8()),
            pa.array(counts),
        ],
        schema=VOCABULARY,
    )
    write_arrow(joined_path(out, identity, "vocabulary"), vocabulary)
    write_arrow(
        joined_path(out, identity, "tag_map"),
        pa.RecordBatch.from_arrays([ids], names=["ids"]),
    )
    if joined.pointers is not None:
        write_arrow(
            joined_path(out, identity, "pointers"),
            pa.RecordBatch.from_arrays(
                [pa.array(rows.astype(np.int32)) for rows in joined.pointers.values()], names=list(joined.pointers)
            ),
        )


def _unified(parts: Sequence[Part]) -> tuple[pa.Array, pa.LargeListArray]:
    """All tags as `category NUL tag`, in order of first appearance, and where each part's tags stand among them.

    One part at a time: the tags of all parts together are many times the tags that differ.
    """
    known = pa.array([], pa.string())
    offsets = np.concatenate([[0], np.cumsum([len(part.vocabulary) for part in parts], dtype=np.int64)])
    ids = np.empty(int(offsets[-1]), np.uint32)
    for part, begin, end in zip(parts, offsets, offsets[1:], strict=False):
        vocabulary = part.vocabulary
        texts = pc.binary_join_element_wise(vocabulary["category"].cast(pa.string()), vocabulary["tag"], "\0")
        new = texts.filter(pc.is_null(pc.index_in(texts, known)))
        known = pa.concat_arrays([known, new])
        ids[begin:end] = pc.index_in(texts, known).to_numpy()
        part.forget()
    return known, pa.LargeListArray.from_arrays(pa.array(offsets), pa.array(ids))


def _counts_of(
    parts: Sequence[Part], maps: Sequence[np.ndarray[Any, Any]], rows: np.ndarray[Any, Any], num_tags: int
) -> np.ndarray[Any, Any]:
    """How many records have each tag, where only some rows' tags are used. `rows`: one row number a record, or -1."""
    counts = np.zeros(num_tags, np.int64)
    starts = part_starts(parts)
    rows = np.sort(rows)
    for number, (part, ids) in enumerate(zip(parts, maps, strict=True)):
        begin, end = np.searchsorted(rows, starts[number : number + 2])
        tags = part.rows["tags"].take(pa.array(rows[begin:end] - starts[number])).flatten().to_numpy()
        counts += np.bincount(ids[tags], minlength=num_tags)
        part.forget()
    return counts


def _missing(parts: Sequence[Part], joined: Joined) -> dict[str, int]:
    """Records that have no image, facts, tags, caption."""
    if joined.pointers is not None:
        return {group: int((joined.pointers[group] < 0).sum()) for group in GROUPS}
    shown_by = {**GROUPS, "image": ("image",), "tags": ("tags",)}
    missing = dict.fromkeys(shown_by, 0)
    for part in parts:
        for group, columns in shown_by.items():
            absent = [np.asarray(part.rows[column].is_null()) for column in columns]
            missing[group] += int(np.logical_and.reduce(absent).sum())
        part.forget()
    return missing


def _rejections(
    refs: Sequence[CatalogPartRef], sources: Sequence[CatalogSource], parts: Sequence[Part], joined: Joined
) -> Iterator[Rejected]:
    for ref in refs:
        if ref.num_rejected:
            yield from read_rejected(_rejected_path(ref.path))
    starts = part_starts(parts)
    for begin in range(0, len(joined.duplicates), 65_536):
        rows = joined.duplicates[begin : begin + 65_536]
        for row, key in zip(rows, keys_of(parts, starts, rows), strict=True):
            source = sources[refs[int(np.searchsorted(starts, row, "right")) - 1].source]
            yield rejected(key, "duplicate_key", f"{source.path} names it more than once; its first row is used")


def _first_rejection(parts: Sequence[CatalogPartRef]) -> str:
    for part in parts:
        for row in islice(read_rejected(_rejected_path(part.path)), 1):
            return f"the first, {row.key}: {row.detail}."
    if any(part.num_filtered for part in parts):
        return "all that could be read are of other ratings than `ratings` names; name more, or take the setting away."
    return "the source is empty."


def _ref(out: Path, stored: dict[str, Any]) -> CatalogRef:
    return CatalogRef(
        path=out,
        digest=stored["digest"],
        num_records=stored["num_records"],
        num_tags=len(open_arrow(joined_path(out, stored["joined"], "vocabulary"))),
        num_seen=stored["num_seen"],
        num_filtered=stored["num_filtered"],
        num_taken_out=stored.get("num_taken_out", 0),  # not told by a catalog that was made before it was counted
        num_rejected=stored["num_rejected"],
        missing=stored["missing"],
        conflicts=stored["conflicts"],
        rejected=out / "rejected.jsonl",
        parents=tuple(part["digest"] for part in stored["parts"]),
    )


def _is_whole(out: Path, stored: dict[str, Any]) -> bool:
    """Whether every file that the manifest stands for can be opened."""
    try:
        catalog = Catalog.open(out)
        for part in catalog.parts:
            _ = part.rows, part.vocabulary
        for what in ("vocabulary", "tag_map", *(["pointers"] if stored["has_pointers"] else [])):
            open_arrow(joined_path(out, stored["joined"], what))
    except DataError:
        return False
    return (out / "rejected.jsonl").exists()


def _remove_old(out: Path, stored: dict[str, Any]) -> None:
    parts, joined = {part["digest"] for part in stored["parts"]}, stored["joined"][:32]
    for path in (out / "parts").iterdir():
        if path.name.split(".")[0] not in parts:
            path.unlink(missing_ok=True)
    for path in (out / "joined").iterdir():
        if path.name.split(".")[0] != joined:
            path.unlink(missing_ok=True)


def _part_path(out: Path, digest: str) -> Path:
    return out / "parts" / digest[:32]


def _files(part: CatalogPartRef) -> list[Path]:
    left_out = [rows_path(left_out_path(part.path))] if part.num_filtered else []
    return [rows_path(part.path), vocab_path(part.path), _rejected_path(part.path), *left_out]


def _rejected_path(path: Path) -> Path:
    return path.with_name(f"{path.name}.rejected.jsonl")


def _result_path(path: Path) -> Path:
    return path.with_name(f"{path.name}.result.json")
