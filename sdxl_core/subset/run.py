"""Make a subset of a catalog: picked records in, a manifest or a folder of files out."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import orjson

from sdxl_core.catalog.records import Catalog
from sdxl_core.config import SubsetHow
from sdxl_core.errors import ConfigError, DataError, ShardError
from sdxl_core.files import digest_of, digest_of_all, remove_stale_partials, write_atomic
from sdxl_core.lock import output_lock
from sdxl_core.progress import Progress, Summed, no_progress
from sdxl_core.refs import PlacedShardRef, SubsetPlanRef, SubsetRef, to_json
from sdxl_core.rejected import Rejected, read_rejected
from sdxl_core.subset.ledger import HEAD_FILE, Ledger, check_out, read_head, work_folder
from sdxl_core.subset.manifest import MANIFEST_FILE, Manifest, write_manifest
from sdxl_core.subset.picks import (
    STAGE,
    Halves,
    manifest_rows,
    picked_batches,
    without_image,
    without_text,
)
from sdxl_core.subset.plan import OTHERS_FILE, Picks, plan_picks, refuse_without_pictures, write_if_news
from sdxl_core.subset.shard import place_shard

Ints = np.ndarray[Any, np.dtype[Any]]
MISSING_FILE = "missing.jsonl"
REJECTED_FILE = "rejected.jsonl"
PURPOSE = "makes a subset"


def subset_records(
    catalog: Catalog,
    records: Ints,
    *,
    settings: dict[str, str],
    how: SubsetHow,
    out: Path,
    unjudged: Sequence[Rejected] = (),
    refused: Sequence[Rejected] = (),
    shard_size: int = 4_096,
    progress: Progress = no_progress,
) -> SubsetRef:
    """Make the subset of the given records; afterwards `out` holds it and nothing of an earlier state of it.

    A second run does what is missing. Files that are not ours, or were changed since, are never touched.
    Args:   records: numbers of the picked records, int64, each once; the order is kept.
            settings: what `out` belongs to: `query`, `source` and what else makes another subset.
            unjudged: records that the query could not be answered for; none of `records`.
            refused: what the source has besides its records.
            shard_size: pictures that are placed, and remembered, together; what comes out does not depend on it.
    Raises: ConfigError: `out` belongs to other settings or holds a source, or `how` is not possible there.
            DataError: a file of another content is in the way.   LockedError, DiskFullError.
    """
    others = [*refused, *unjudged]
    if how == "manifest":
        check_out(out, [])
        with output_lock(out, purpose=PURPOSE):
            return _manifest(catalog, records, settings, out, others, len(refused))
    picks = picks_of(catalog, records, settings=settings, how=how, out=out)
    with output_lock(out, purpose=PURPOSE):
        plan = plan_picks(picks, shard_size=shard_size, others=others, num_refused=len(refused))
        return join_placed(plan, list(_placed(plan, picks, progress)))


def picks_of(catalog: Catalog, records: Ints, *, settings: dict[str, str], how: str, out: Path) -> Picks:
    """What shall be placed. Raises: ConfigError: it cannot be, there."""
    refuse_without_pictures(catalog, how)
    check_out(out, [source.path for source in catalog.sources])
    return Picks(out, catalog, {**settings, "how": how}, np.ascontiguousarray(records, np.int64))


def _placed(plan: SubsetPlanRef, picks: Picks, progress: Progress) -> Iterator[PlacedShardRef]:
    summed = Summed(progress, f"subset: {picks.how}", len(picks.records))
    for shard in plan.shards:
        yield place_shard(shard, picks=picks, progress=summed.part())


def join_placed(plan: SubsetPlanRef, shards: Sequence[PlacedShardRef]) -> SubsetRef:
    """Say what the whole subset is and what of it was rejected, when all shards are placed.

    Args:   shards: in order.
    Raises: ShardError: a shard's ledger is not the one that was written.
    """
    picks = Picks.open(plan.path)
    others = read_rejected(work_folder(picks.out) / OTHERS_FILE)
    failed: list[Rejected] = []
    digest = digest_of_all(_states(shards, failed))
    rows = chain(others, without_image(picks.catalog, picks.records), failed)
    halves = Halves()
    for batch in picked_batches(picks.catalog, picks.records, ()):
        halves.add(batch.table)
    num_kept = sum(shard.num_kept for shard in shards)
    num_others = len(others) + len(failed)
    ref = _ref(
        picks.catalog, picks.records, picks.settings, picks.out, digest, num_kept, rows, num_others, halves,
        plan.num_refused,
    )  # fmt: skip
    told = orjson.dumps(
        {"settings": picks.settings, "finished": True, "shards": [shard.digest for shard in plan.shards]}
    )
    if (picks.out / HEAD_FILE).read_bytes() != told:  # last: it marks the work done
        write_atomic(picks.out / HEAD_FILE, told)
    return ref


def _states(shards: Iterable[PlacedShardRef], failed: list[Rejected]) -> Iterator[str]:
    """Names, sizes and times of all files, in order; pictures that could not be placed go into `failed`."""
    for shard in shards:
        ledger = Ledger.read(shard.path)
        if not ledger.finished or len(ledger.written) != shard.num_files:
            raise ShardError(
                f"{shard.path}: what shard {shard.index} has placed was changed or removed meanwhile. Run the same "
                f"command again; it places what is missing."
            )
        failed += [
            Rejected(stage=STAGE, key=key, reason="unreadable_file", detail=detail) for key, detail in ledger.failed
        ]
        for name, ((size, time), *_) in ledger.written.items():
            yield f"{name}|{size}|{time}"


def _manifest(
    catalog: Catalog,
    records: Ints,
    settings: dict[str, str],
    out: Path,
    unjudged: Sequence[Rejected],
    num_refused: int,
) -> SubsetRef:
    settings = {**settings, "how": "manifest"}
    path, ledger = out / MANIFEST_FILE, out / HEAD_FILE
    numbers = np.ascontiguousarray(records, np.int64)
    digest = digest_of("manifest", catalog.digest, numbers.tobytes(), *(row.key for row in unjudged))
    stored = read_head(out, settings=settings)
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
