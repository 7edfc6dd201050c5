"""Make a subset of a catalog: picked records in, a manifest or a folder of files out."""

from __future__ import annotations

import filecmp
import os
from collections.abc import Iterable, Sequence
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import orjson

from sdxl_core.catalog.records import Catalog
from sdxl_core.config import SubsetHow
from sdxl_core.errors import ConfigError, DataError
from sdxl_core.files import digest_of, remove_stale_partials, write_atomic
from sdxl_core.lock import output_lock
from sdxl_core.progress import Progress, no_progress
from sdxl_core.refs import SubsetRef, to_json
from sdxl_core.rejected import Rejected, write_rejected
from sdxl_core.subset.manifest import MANIFEST_FILE, Manifest, write_manifest
from sdxl_core.subset.methods import PlacingFailed
from sdxl_core.subset.picks import (
    STAGE,
    Halves,
    manifest_rows,
    picked_batches,
    wanted_groups,
    without_image,
    without_text,
)
from sdxl_core.subset.placed import LEDGER_FILE, Placed, check_out, read_ledger

Ints = np.ndarray[Any, np.dtype[Any]]
MISSING_FILE = "missing.jsonl"
REJECTED_FILE = "rejected.jsonl"


def subset_records(
    catalog: Catalog,
    records: Ints,
    *,
    settings: dict[str, str],
    how: SubsetHow,
    out: Path,
    unjudged: Sequence[Rejected] = (),
    refused: Sequence[Rejected] = (),
    progress: Progress = no_progress,
) -> SubsetRef:
    """Make the subset of the given records; afterwards `out` holds it and nothing of an earlier state of it.

    A second run does what is missing. Files that are not ours, or were changed since, are never touched.
    Args:   records: numbers of the picked records, int64, each once; the order is kept.
            settings: what `out` belongs to: `query`, `source` and what else makes another subset.
            unjudged: records that the query could not be answered for; none of `records`.
            refused: what the source has besides its records.
    Raises: ConfigError: `out` belongs to other settings or holds a source, or `how` is not possible there.
            DataError: a file of another content is in the way.   LockedError, DiskFullError.
    """
    if how != "manifest" and not catalog.knows_pictures:
        raise ConfigError(
            f"how = {how}: no source of {catalog.path} has pictures, so none can be placed. Use --how manifest, or "
            f"build the catalog with the folder or the tars of the pictures among its sources."
        )
    check_out(out, [] if how == "manifest" else [source.path for source in catalog.sources])
    with output_lock(out, purpose="makes a subset"):
        if how == "manifest":
            return _manifest(catalog, records, settings, out, [*refused, *unjudged], len(refused))
        return _placed(catalog, records, settings, how, out, [*refused, *unjudged], len(refused), progress)


def _manifest(
    catalog: Catalog,
    records: Ints,
    settings: dict[str, str],
    out: Path,
    unjudged: Sequence[Rejected],
    num_refused: int,
) -> SubsetRef:
    settings = {**settings, "how": "manifest"}
    path, ledger = out / MANIFEST_FILE, out / LEDGER_FILE
    numbers = np.ascontiguousarray(records, np.int64)
    digest = digest_of("manifest", catalog.digest, numbers.tobytes(), *(row.key for row in unjudged))
    stored = read_ledger(out, settings=settings)
    if stored is None and path.exists():
        raise DataError(f"{path} exists and is not ours; it is not overwritten. Choose another out folder.")
    if stored is not None and stored["finished"] and stored.get("digest") == digest and _stands(path, stored):
        return SubsetRef(**stored["ref"])
    remove_stale_partials(out, name="*")
    write_atomic(ledger, orjson.dumps({"settings": settings, "finished": False}))
    halves = Halves()
    num_kept = write_manifest(
        path,
        manifest_rows(catalog, numbers, halves),
        catalog=catalog.path.resolve(),
        catalog_digest=catalog.digest,
        query=settings["query"],
        roots=[source.path for source in catalog.sources],
    )
    rows = chain(unjudged, without_image(catalog, numbers))
    ref = _ref(catalog, numbers, settings, out, digest, num_kept, rows, len(unjudged), halves, num_refused)
    content = {"settings": settings, "finished": True, "digest": digest, "ref": to_json(ref)}
    write_atomic(ledger, orjson.dumps(content))
    return ref


def _stands(path: Path, stored: dict[str, Any]) -> bool:
    try:
        return Manifest.open(path).num_records == stored["ref"]["num_kept"] and (path.parent / REJECTED_FILE).exists()
    except (ConfigError, DataError):
        return False


def _placed(
    catalog: Catalog,
    records: Ints,
    settings: dict[str, str],
    how: str,
    out: Path,
    unjudged: Sequence[Rejected],
    num_refused: int,
    progress: Progress,
) -> SubsetRef:
    placed = Placed.open(out, how=how, settings=settings)
    placed.begin(wanted_groups(catalog, records))
    failed: list[Rejected] = []
    num_kept = 0
    for number, group in enumerate(wanted_groups(catalog, records)):
        try:
            placed.place(group)
            num_kept += 1
        except PlacingFailed as error:
            failed.append(Rejected(stage=STAGE, key=group.key, reason="unreadable_file", detail=str(error)))
        progress(f"subset: {how}", number + 1, len(records))
    halves = Halves()
    for batch in picked_batches(catalog, records, ()):
        halves.add(batch.table)
    rows = chain(unjudged, without_image(catalog, records), failed)
    others = len(unjudged) + len(failed)
    digest = placed.digest()
    ref = _ref(catalog, records, {**settings, "how": how}, out, digest, num_kept, rows, others, halves, num_refused)
    placed.finish()  # last: it marks the work done
    return ref


def _ref(
    catalog: Catalog,
    records: Ints,
    settings: dict[str, str],
    out: Path,
    digest: str,
    num_kept: int,
    rejected: Iterable[Rejected],
    num_others: int,
    halves: Halves,
    num_refused: int,
) -> SubsetRef:
    num_rejected = write_if_news(out / REJECTED_FILE, rejected)
    write_if_news(out / MISSING_FILE, without_text(catalog, records))
    missing = halves.told()
    assert num_rejected == num_others + (missing["image"] if catalog.knows_pictures else 0)
    return SubsetRef(
        path=out,
        catalog=catalog.path,
        digest=digest,
        query=settings["query"],
        how=settings["how"],
        num_seen=catalog.num_records + num_refused,
        num_kept=num_kept,
        num_unmatched=catalog.num_records + num_refused - num_kept - num_rejected,
        num_rejected=num_rejected,
        missing=missing,
        rejected=out / REJECTED_FILE,
        parents=(catalog.digest,),
    )


def write_if_news(path: Path, rows: Iterable[Rejected]) -> int:
    """Write a list of rejections as it comes; one that is there already keeps its file. Returns the number of rows."""
    news = path.with_name(f".{path.name}.new")
    num_rows = write_rejected(news, rows)
    if path.exists() and filecmp.cmp(news, path, shallow=False):
        news.unlink()
    else:
        os.replace(news, path)
    return num_rows
