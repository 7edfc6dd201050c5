"""Taking pictures out of a latent set."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from sdxl_core.config import RemoveLatentsConfig
from sdxl_core.errors import ConfigError, DataError, ShardError
from sdxl_core.latents.index import INDEX_END
from sdxl_core.latents.join import SET, join_latents
from sdxl_core.latents.ledger import KEPT, REMOVED, ShardLedger
from sdxl_core.latents.matching import NameTable
from sdxl_core.latents.plan import PLAN, last_plan
from sdxl_core.latents.rows import ENDING, LEDGER_FOLDER, ShardRows
from sdxl_core.latents.settings import latents_folder, stored_config
from sdxl_core.lock import output_lock
from sdxl_core.progress import Progress, no_progress
from sdxl_core.refs import RemovedRef

Ints = np.ndarray[Any, np.dtype[Any]]


def remove_latents(config: RemoveLatentsConfig, *, progress: Progress = no_progress) -> RemovedRef:
    """Take pictures' latents out: their rows in the ledgers, their files, and their entries in meta_lat.json and index.

    Rows of packed files stay on disk until `compact`. What the metadata still asks for is encoded again by the next
    cache-latents. Raises: ConfigError, DataError, LockedError.
    """
    latents = latents_folder(config.path)
    keys = list(dict.fromkeys([*config.keys, *_keys_of(config)]))
    wanted, known = NameTable(pa.array(keys, pa.large_string())), np.zeros(len(keys), bool)
    num_removed = 0
    with output_lock(latents, purpose="remove-latents"):
        paths = sorted((latents / LEDGER_FOLDER).glob(f"*{ENDING}"))
        for number, path in enumerate(paths):
            rows = ShardRows.open(path)
            found = wanted.find(rows.table["key"])
            mine = np.flatnonzero(found >= 0)
            if len(mine):
                removed = _remove(latents, path, rows, mine)
                known[found[removed]] = True
                num_removed += len(removed)
            progress("remove", number + 1, len(paths))
        if num_removed:
            _join_without(latents)
    return RemovedRef(path=latents, num_removed=num_removed, num_unknown=int((~known).sum()))


def _keys_of(config: RemoveLatentsConfig) -> list[str]:
    if config.keys_file is None:
        return []
    try:
        return config.keys_file.read_text("utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{config.keys_file}: cannot be read as a list of keys, one a line ({error}).") from error


def _remove(latents: Path, path: Path, rows: ShardRows, mine: Ints) -> Ints:
    """Take rows out of a shard. Returns those that were there."""
    ledger = ShardLedger.read(path, rows.num_rows)
    mine = mine[ledger.columns["state"][mine] != REMOVED]
    kept = mine[ledger.columns["state"][mine] == KEPT]
    ledger.remove(mine)
    if ledger.is_done:
        ledger.summarise()
    for row in kept[ledger.columns["at"][kept] < 0].tolist():
        (latents / ledger.files[ledger.columns["file"][row]].path).unlink(missing_ok=True)
    return mine


def _join_without(latents: Path) -> None:
    """meta_lat.json and the index name only what is left; the next run plans anew."""
    folder = latents / LEDGER_FOLDER
    plan = last_plan(folder)
    try:
        if plan is None:
            raise ShardError(f"{folder}: without a plan")
        join_latents(stored_config(latents), plan)
    except (ConfigError, DataError):  # a shard is not finished, or the metadata is another: the next run joins
        (latents / INDEX_END).unlink(missing_ok=True)
        (folder / SET).unlink(missing_ok=True)
    (folder / PLAN).unlink(missing_ok=True)
