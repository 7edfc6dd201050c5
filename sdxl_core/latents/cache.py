"""The whole latent cache: plan, encode every shard, join. What tasks and the command line call."""

from __future__ import annotations

import json
import threading
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from contextvars import copy_context
from typing import Any

from sdxl_core.config import CacheLatentsConfig
from sdxl_core.dataset.metadata import read_metadata
from sdxl_core.devices import SlotDied, Slots, resolve_devices
from sdxl_core.errors import DataError, ShardError
from sdxl_core.files import sha256_file, write_atomic
from sdxl_core.latents.encode import encode_shard, shard_is_finished
from sdxl_core.latents.ledger import LEDGER_FOLDER, LatentRow, ShardLedger
from sdxl_core.latents.plan import LatentPlan, ledger_path, plan_latents
from sdxl_core.lock import output_lock
from sdxl_core.progress import Progress, no_progress
from sdxl_core.refs import FileRef, LatentSetRef, LatentShardRef, ShardRef
from sdxl_core.rejected import Rejected, count_reasons, update_rejected

__all__ = [
    "LatentPlan",
    "cache_latents",
    "encode_shard",
    "join_latents",
    "plan_latents",
    "shard_is_finished",
    "watch_progress",
]

STAGE = "latents"
ATTEMPTS = 4
WATCH_EVERY_S = 2.0


def cache_latents(config: CacheLatentsConfig, *, progress: Progress = no_progress) -> LatentSetRef:
    """Encode every picture of the metadata that is not encoded yet.

    One CPU slot works in this process; cards, and several slots, each in a process of their own, which is started again
    when it is killed. Raises: ConfigError, DataError, LockedError, DiskFullError, SlotDied (the same shard four times).
    """
    devices = resolve_devices(config.devices)
    with output_lock(config.out / "latents", purpose="cache-latents"):
        plan = plan_latents(config)
        if devices == ["cpu"]:
            shards = _encode_here(plan, config, progress)
        else:
            with (
                Slots(devices) as slots,
                watch_progress(plan, config, progress),
                ThreadPoolExecutor(len(devices)) as threads,
            ):
                shards = list(threads.map(lambda shard: _encode_in_slot(shard, config, slots), plan.shards))
        return join_latents(config, shards)


def _encode_here(plan: LatentPlan, config: CacheLatentsConfig, progress: Progress) -> list[LatentShardRef]:
    shards = []
    for shard in plan.shards:

        def report(stage: str, done: int, total: int, note: str = "", *, before: int = shard.start) -> None:
            progress(stage, before + done, plan.num_seen, note)

        shards.append(encode_shard(shard, config, "cpu", progress=report))
    return shards


def _encode_in_slot(shard: ShardRef, config: CacheLatentsConfig, slots: Slots) -> LatentShardRef:
    for attempt in range(ATTEMPTS):
        try:
            with slots.checkout() as slot:
                return slot.run(encode_shard, shard, config, slot.device)
        except SlotDied:
            if attempt == ATTEMPTS - 1:
                raise
    raise AssertionError("unreachable")


@contextmanager
def watch_progress(plan: LatentPlan, config: CacheLatentsConfig, progress: Progress) -> Iterator[None]:
    """Report what the shards' ledgers hold while the block runs: progress made in other processes."""
    stop = threading.Event()

    def watch() -> None:
        finished: set[int] = set()
        while True:
            last = stop.wait(WATCH_EVERY_S)
            done = 0
            for shard in plan.shards:
                if shard.index in finished:
                    done += shard.stop - shard.start
                    continue
                ledger = ShardLedger.read(ledger_path(shard))
                if ledger.done is not None:
                    finished.add(shard.index)
                done += len(ledger.rows()) + len(ledger.rejected())
            progress(STAGE, done, plan.num_seen)
            if last:
                return

    watcher = threading.Thread(
        target=copy_context().run, args=(watch,), daemon=True
    )  # the caller's run, in its artifacts
    watcher.start()
    try:
        yield
    finally:
        stop.set()
        watcher.join()


def join_latents(config: CacheLatentsConfig, shards: Sequence[LatentShardRef]) -> LatentSetRef:
    """Write meta_lat.json and rejected.jsonl from the shards' ledgers, in the order of the metadata.

    Raises: DataError: no picture could be encoded.   DiskFullError.
    """
    rows: dict[str, LatentRow] = {}
    rejected: list[Rejected] = []
    for shard in shards:
        ledger = ShardLedger.read(shard.ledger)
        rows |= {row.key: row for row in ledger.rows()}
        rejected += [Rejected(stage=STAGE, key=k, reason=r, detail=d) for k, r, d in ledger.rejected()]
    num_seen = sum(shard.num_seen for shard in shards)
    if len(rows) + len(rejected) != num_seen:
        raise ShardError(
            f"{config.out / 'latents' / LEDGER_FOLDER}: tells of {len(rows)} encoded and {len(rejected)} rejected "
            f"pictures, and {num_seen} were looked at: a ledger was changed meanwhile. Run the same command again; it "
            f"encodes what is not recorded."
        )
    rejected_path = config.out / "rejected.jsonl"
    update_rejected(rejected_path, STAGE, rejected)
    if not rows:
        reasons = ", ".join(f"{count} {reason}" for reason, count in count_reasons(rejected).items())
        raise DataError(
            f"{config.metadata}: none of its {len(rejected)} pictures could be encoded ({reasons}). {rejected_path} "
            f"tells each one's reason; missing_image means that source = {config.source} is not their folder."
        )
    path = config.out / "meta_lat.json"
    metadata = read_metadata(config.metadata)
    text = b"".join(_metadata_json(metadata, rows))
    if not (path.exists() and path.read_bytes() == text):
        write_atomic(path, text)
    _remove_old_ledgers(config, shards)
    buckets = Counter(row.bucket for row in rows.values())
    return LatentSetRef(
        path=config.out / "latents",
        metadata=FileRef(path=path, sha256=sha256_file(path), num_bytes=path.stat().st_size),
        fingerprint=sha256_file(config.out / "latents" / LEDGER_FOLDER / "settings.json"),
        num_seen=num_seen,
        num_kept=len(rows),
        num_rejected=len(rejected),
        mean_ar_error=sum(abs(row.ar_error) for row in rows.values()) / len(rows),
        buckets={f"{width}x{height}": buckets[width, height] for width, height in sorted(buckets)},
        rejected=rejected_path,
        parents=(sha256_file(config.metadata),),
    )


def _metadata_json(metadata: dict[str, dict[str, Any]], rows: dict[str, LatentRow]) -> Iterator[bytes]:
    """The bytes of json.dumps(…, indent=2) over the entries that have latents, with their train_resolution."""
    separator = "{\n"
    for key, entry in metadata.items():
        if key in rows:
            whole = json.dumps({key: entry | {"train_resolution": list(rows[key].bucket)}}, indent=2)
            yield (separator + whole[2:-2]).encode("ascii")
            separator = ",\n"
    yield b"\n}"


def _remove_old_ledgers(config: CacheLatentsConfig, shards: Sequence[LatentShardRef]) -> None:
    """Ledgers and listings of shards that are no longer part of this set."""
    current = {shard.digest[:32] for shard in shards} | {"settings"}
    for path in (config.out / "latents" / LEDGER_FOLDER).iterdir():
        if path.name.split(".")[0] not in current:
            path.unlink(missing_ok=True)
