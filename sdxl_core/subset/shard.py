"""One shard of a subset: its files placed, or found in their places."""

from __future__ import annotations

from contextlib import suppress

from sdxl_core.errors import DataError
from sdxl_core.progress import Progress, no_progress
from sdxl_core.refs import PlacedShardRef, ShardRef
from sdxl_core.subset.ledger import Ledger, ledger_path
from sdxl_core.subset.methods import PlacingFailed
from sdxl_core.subset.picks import wanted_groups
from sdxl_core.subset.placed import Placed, all_stand
from sdxl_core.subset.plan import Picks


def place_shard(shard: ShardRef, *, picks: Picks | None = None, progress: Progress = no_progress) -> PlacedShardRef:
    """Place the files of one shard; a finished shard whose files all stand answers at once.

    Args:   picks: where the caller has them open.   progress: of this shard alone.
    Raises: DataError: a file of another content is in the way, or the picks are gone.   ConfigError: links are not
            possible.   DiskFullError.
    """
    finished = placed_shard(shard)
    if finished is not None:
        progress("subset", shard.stop - shard.start, shard.stop - shard.start)
        return finished
    picks = picks or Picks.open(shard.path)
    ledger = Ledger.read(ledger_path(picks.out, shard.digest))
    ledger.num_kept, ledger.failed = 0, []
    placed = Placed(picks.out, picks.how, ledger)
    placed.plan(wanted_groups(picks.catalog, picks.part(shard)))
    placed.begin()
    for number, group in enumerate(wanted_groups(picks.catalog, picks.part(shard))):
        with suppress(PlacingFailed):  # the ledger has it
            placed.place(group)
        progress("subset", number + 1, shard.stop - shard.start)
    placed.finish()
    return _ref(shard, ledger)


def shard_is_placed(shard: ShardRef) -> bool:
    """Whether all files of the shard are there, with the size and time they were left with."""
    return placed_shard(shard) is not None


def placed_shard(shard: ShardRef) -> PlacedShardRef | None:
    """The finished shard as its ledger tells it, None where one of its files is missing or another.

    A shard with pictures that could not be read is never finished: the next run tries them again.
    """
    out = shard.path.parent.parent
    try:
        ledger = Ledger.read(ledger_path(out, shard.digest))
    except DataError:
        return None
    is_finished = ledger.finished and not ledger.failed and all_stand(ledger, out)
    return _ref(shard, ledger) if is_finished else None


def _ref(shard: ShardRef, ledger: Ledger) -> PlacedShardRef:
    return PlacedShardRef(
        index=shard.index,
        digest=shard.digest,
        path=ledger.path,
        num_seen=shard.stop - shard.start,
        num_kept=ledger.num_kept,
        num_failed=len(ledger.failed),
        num_files=len(ledger.written),
    )
