"""The subset stage: what a query picks of a catalog, or of a folder, as a manifest or as files."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

from sdxl_core.catalog.build import build_catalog
from sdxl_core.catalog.config import CatalogConfig, CatalogSource
from sdxl_core.catalog.records import Catalog, is_catalog
from sdxl_core.catalog.sizes import read_sizes
from sdxl_core.config import SubsetConfig, SubsetHow
from sdxl_core.errors import DataError
from sdxl_core.lock import output_lock
from sdxl_core.progress import Progress, no_progress
from sdxl_core.query.explain import SIZES_NOT_READ, explain, explained_text
from sdxl_core.query.expressions import (
    And,
    Has,
    Not,
    Query,
    Range,
    Tag,
    Values,
    Wildcard,
    asks_for_size,
    walk,
    whatever_sizes,
)
from sdxl_core.query.grammar import parse
from sdxl_core.query.index import open_index
from sdxl_core.query.select import Selection, select_by_scan
from sdxl_core.refs import SubsetPlanRef, SubsetRef
from sdxl_core.rejected import Rejected, count_reasons, read_rejected
from sdxl_core.subset.ledger import check_out
from sdxl_core.subset.picks import STAGE
from sdxl_core.subset.plan import Ints, plan_picks
from sdxl_core.subset.run import PURPOSE, picks_of, subset_records


def subset(config: SubsetConfig, *, progress: Progress = no_progress) -> SubsetRef:
    """Pick pictures by the query and list or place them; afterwards `out` holds these and no earlier picks.

    A second run does what is missing or has changed in the source, and removes its own files of what the query no
    longer picks. Files that it did not write, or that were changed since, are never touched. A picture of whose tags
    nothing is known is not picked by a query that asks for tags, not even by -tag; of a folder it is rejected.
    Raises: ConfigError: a wrong query, or `out` belongs to other settings.   DataError: nothing matches, or a file of
    another content is in the way.   DiskFullError.
    """
    looked_at, records = _picked(config, progress)
    return subset_records(
        looked_at.catalog,
        records,
        settings=_settings(config),
        how=_how(config),
        out=config.out,
        unjudged=looked_at.unjudged,
        refused=looked_at.refused,
        shard_size=config.shard_size,
        progress=progress,
    )


def places_files(config: SubsetConfig) -> bool:
    """Whether the subset is files, made in shards; else it is a list, which takes 1 us a picture."""
    return _how(config) != "manifest"


def subset_lock(config: SubsetConfig) -> AbstractContextManager[None]:
    """For whoever plans, places and joins one by one: nobody else makes this subset meanwhile. Raises: LockedError."""
    _check_folders(config)
    return output_lock(config.out, purpose=PURPOSE)


def plan_subset(config: SubsetConfig, *, progress: Progress = no_progress) -> SubsetPlanRef:
    """Pick pictures by the query and cut them into shards for `shard.place_shard`. Raises: as `subset`."""
    looked_at, records = _picked(config, progress)
    picks = picks_of(looked_at.catalog, records, settings=_settings(config), how=_how(config), out=config.out)
    others = [*looked_at.refused, *looked_at.unjudged]
    with subset_lock(config):
        return plan_picks(picks, shard_size=config.shard_size, others=others, num_refused=len(looked_at.refused))


def _picked(config: SubsetConfig, progress: Progress) -> tuple[_LookedAt, Ints]:
    """The records that the query picks. Raises: ConfigError, DataError: there are none."""
    query = parse(config.query)
    _check_folders(config)
    looked_at = _look_at(config, query, progress)
    looked_at = looked_at._replace(catalog=with_sizes(looked_at.catalog, query, progress=progress))
    picked = select(looked_at.catalog, query)
    if not len(picked.records):
        raise DataError(_nothing_matches(config, query, looked_at))
    return looked_at, picked.records


def _how(config: SubsetConfig) -> SubsetHow:
    return "copy" if config.how == "auto" else config.how


def _check_folders(config: SubsetConfig) -> None:
    if not is_catalog(config.source):
        check_out(config.out, [config.source])
    else:
        check_out(config.out, [])


def select(catalog: Catalog, query: Query) -> Selection:
    """The records that a query picks, through the index where there is one."""
    query = replace(query, where=_judged(query))
    index = open_index(catalog)
    return index.select(query) if index is not None else select_by_scan(catalog, query)


def with_sizes(catalog: Catalog, query: Query, *, progress: Progress = no_progress) -> Catalog:
    """The catalog with the sizes that a query asks for; read of those pictures only that the rest of it may find.

    Raises: as `read_sizes`.
    """
    if not any(map(asks_for_size, walk(query.where))):
        return catalog
    candidates = select(catalog, replace(query, where=whatever_sizes(query.where), limit=None, random=None))
    return read_sizes(catalog, candidates.records, progress=progress)


def explain_query(config: SubsetConfig, *, progress: Progress = no_progress) -> str:
    """The counts of every term of the query, before anything is done with it, and of what would be picked.

    Raises: as `subset`.
    """
    query = parse(config.query)
    catalog = _look_at(config, query, progress).catalog
    if any(map(asks_for_size, walk(query.where))):
        catalog = read_sizes(catalog, progress=progress)  # of all: each term is counted over all
    explained = explain(catalog, query, open_index(catalog))
    picked = select(catalog, query)
    names = ("limit", "random")
    why = [f"{name}:{number:,}" for name in names if (number := getattr(query, name)) is not None]
    if picked.num_matched < explained[0].num_records:
        why.insert(0, f"{explained[0].num_records - picked.num_matched:,} of unknown tags left out")
    line = f"{len(picked.records):>12,}  picked" + (f" ({', '.join(why)})" if why else "")
    return f"{explained_text(explained, catalog.num_records)}\n{line}"


class _LookedAt(NamedTuple):
    """`refused`: what is no record.   `unjudged`: records of a folder that the query cannot be answered for."""

    catalog: Catalog
    refused: list[Rejected]
    unjudged: list[Rejected]


def _look_at(config: SubsetConfig, query: Query, progress: Progress) -> _LookedAt:
    if is_catalog(config.source):
        return _LookedAt(Catalog.open(config.source), [], [])
    source = CatalogSource(
        path=config.source,
        kind="folder",
        recursive=config.recursive,
        tag_extension=config.tag_extension,
        caption_extension=config.caption_extension,
    )
    ref = build_catalog(
        CatalogConfig(sources=(source,), out=folder_catalog(config.out), index=False), progress=progress
    )
    refused = [replace(row, stage=STAGE) for row in read_rejected(ref.rejected)]
    catalog = Catalog.open(ref.path)
    return _LookedAt(catalog, refused, list(_untagged(catalog, config)) if _asks_for_tags(query) else [])


def folder_catalog(out: Path) -> Path:
    """Where the catalog of a folder is kept, beside the subset that is made of it."""
    return out.parent / f".{out.name}.catalog"


def _untagged(catalog: Catalog, config: SubsetConfig) -> Iterator[Rejected]:
    lacking = select_by_scan(catalog, Query("", Not(Has("tags")))).records
    for key in catalog.take(lacking, ["key"])["key"].to_pylist():
        name = key.rpartition("/")[2] + config.tag_extension
        detail = f"there is no {name}, so the query cannot be answered"
        yield Rejected(stage=STAGE, key=key, reason="no_caption", detail=detail)


def _asks_for_tags(query: Query) -> bool:
    return any(
        isinstance(part, Tag | Wildcard) or (isinstance(part, Range | Values) and part.number == "tagcount")
        for part in walk(query.where)
    )


def _judged(query: Query) -> And:
    return And((query.where, Has("tags"))) if _asks_for_tags(query) else And((query.where,))


def _settings(config: SubsetConfig) -> dict[str, str]:
    """The settings that `out` belongs to."""
    names = ("query",) if is_catalog(config.source) else ("query", "recursive", "tag_extension", "caption_extension")
    return {"source": str(config.source.resolve())} | {name: str(getattr(config, name)) for name in names}


def _nothing_matches(config: SubsetConfig, query: Query, looked_at: _LookedAt) -> str:
    catalog = looked_at.catalog
    num_seen = catalog.num_records + len(looked_at.refused)
    lines = [f"query {config.query!r} matches none of the {num_seen:,} pictures in {config.source}."]
    unjudged = [*looked_at.refused, *looked_at.unjudged]
    if unjudged:
        reasons = ", ".join(f"{count} {reason}" for reason, count in count_reasons(unjudged).items())
        lines.append(f"  {len(unjudged)} of them cannot be judged ({reasons}).")
    explained = explain(catalog, query, open_index(catalog))
    lines += [
        f"  {part.text} cannot be answered for {part.num_unknown:,} of them: what is unknown matches nothing."
        for part in explained
        if part.num_unknown and not part.num_records and part.note != SIZES_NOT_READ
    ]
    lines.append(explained_text(explained, catalog.num_records))
    return "\n".join(lines)
