"""The whole latent cache: plan, encode every shard, join. What tasks and the command line call."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from contextvars import copy_context
from pathlib import Path

from sdxl_core.config import CacheLatentsConfig
from sdxl_core.devices import SlotDied, Slots
from sdxl_core.engines import open_slots, works_here
from sdxl_core.files import remove_stale_partials
from sdxl_core.latents.join import join_latents
from sdxl_core.latents.ledger import LEDGER, OPEN, ShardLedger, read_summary
from sdxl_core.latents.plan import STAGE, LatentPlan
from sdxl_core.latents.plan import plan_latents as _plan_latents
from sdxl_core.latents.rows import LEDGER_FOLDER, shard_file
from sdxl_core.latents.settings import remember_config
from sdxl_core.latents.shards import chosen_shards, shard_is_finished
from sdxl_core.lock import held_token, output_lock
from sdxl_core.progress import Progress, no_progress
from sdxl_core.refs import LatentSetRef, LatentShardRef, ShardRef

__all__ = [
    "LatentPlan",
    "cache_latents",
    "chosen_shards",
    "draw_page",
    "encode_shard",
    "encode_shard_in_slots",
    "join_latents",
    "plan_latents",
    "shard_is_finished",
    "watch_progress",
]

ATTEMPTS = 4
WATCH_EVERY_S = 2.0


def cache_latents(config: CacheLatentsConfig, *, progress: Progress = no_progress) -> LatentSetRef:
    """Encode every picture of the metadata that is not encoded yet; with `only_shards`, those of these shards.

    `devices = cpu` works in this process; any other in processes of their own, which are started again when they are
    killed; `engine = ray` in those of a Ray cluster.
    Raises: ConfigError, DataError, LockedError, DiskFullError, SlotDied (the same shard four times).
    ShardError: the shards of `only_shards` are finished, but not all the others.
    """
    engine = open_slots(config)
    with output_lock(config.out / "latents", purpose="cache-latents"):
        plan = plan_latents(config)
        left = [shard for shard in chosen_shards(plan, config) if shard_is_finished(shard, config) is None]
        if works_here(config):
            _encode_here(left, plan, config, progress)
        elif left:
            with watch_progress(plan, config, progress), ExitStack() as stack:
                slots = stack.enter_context(engine)
                threads = stack.enter_context(ThreadPoolExecutor(len(slots.slots)))
                stack.callback(slots.stop)  # first: an error or Ctrl-C does not wait for what is under way
                list(threads.map(lambda shard: encode_shard_in_slots(shard, config, slots), left))
        ref = join_latents(config, plan, progress=progress)
        draw_page(config, ref)
        return ref


def draw_page(config: CacheLatentsConfig, ref: LatentSetRef) -> Path:
    """`out/latents.html`: the set to look at."""
    from sdxl_core.report.latents_page import write_latents_page

    return write_latents_page(config, ref)


def plan_latents(config: CacheLatentsConfig) -> LatentPlan:
    """As `plan.plan_latents`; the config is kept beside the ledgers, for `verify --repair`."""
    plan = _plan_latents(config)
    for folder in (config.out, config.out / "latents" / LEDGER_FOLDER):
        remove_stale_partials(folder, name="*")
    remember_config(config.of_all_shards())
    return plan


def encode_shard(
    shard: ShardRef, config: CacheLatentsConfig, device: str, lock: str, *, progress: Progress = no_progress
) -> LatentShardRef:
    """As `encode.encode_shard`, which is imported only where there is something to encode: torch takes seconds."""
    from sdxl_core.latents import encode

    return encode.encode_shard(shard, config, device, lock, progress=progress)


def _encode_here(left: list[ShardRef], plan: LatentPlan, config: CacheLatentsConfig, progress: Progress) -> None:
    before = plan.num_seen - sum(shard.stop - shard.start for shard in left)
    for shard in left:

        def report(stage: str, done: int, total: int, note: str = "", *, before: int = before) -> None:
            progress(stage, before + done, plan.num_seen, note)

        encode_shard(shard, config, "cpu", held_token(config.out / "latents"), progress=report)
        before += shard.stop - shard.start


def encode_shard_in_slots(shard: ShardRef, config: CacheLatentsConfig, slots: Slots) -> LatentShardRef:
    """Encode a shard on the next free device, again and again as long as each process that dies has committed more.

    Raises: SlotDied: ATTEMPTS processes died one after the other and none committed anything.   As `encode_shard`.
    """
    deaths, size = 0, -1
    while True:
        try:
            with slots.checkout() as slot:
                return slot.run(encode_shard, shard, config, slot.device, held_token(config.out / "latents"))
        except SlotDied:
            before, size = size, _size(shard)
            deaths = 1 if size != before else deaths + 1
            if deaths == ATTEMPTS:
                raise


def _size(shard: ShardRef) -> int:
    try:
        return shard_file(shard.path, LEDGER).stat().st_size
    except FileNotFoundError:
        return 0


@contextmanager
def watch_progress(plan: LatentPlan, config: CacheLatentsConfig, progress: Progress) -> Iterator[None]:
    """Report what the shards' ledgers hold while the block runs: progress made in other processes."""
    stop = threading.Event()

    def watch() -> None:
        done = _Done(plan)
        while True:
            last = stop.wait(WATCH_EVERY_S)
            progress(STAGE, min(done.count(), plan.num_seen), plan.num_seen)
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


class _Done:
    """Counts the rows that are not open any more; a ledger is read again only when it has grown."""

    def __init__(self, plan: LatentPlan) -> None:
        self._plan = plan
        self._seen = {shard.index: (-1, 0) for shard in plan.shards}

    def count(self) -> int:
        for shard in self._plan.shards:
            num_bytes, _ = self._seen[shard.index]
            now = _size(shard)
            if now == num_bytes:
                continue
            num_rows = shard.stop - shard.start
            if read_summary(shard.path) is None:
                num_rows -= len(ShardLedger.read(shard.path, num_rows).rows(OPEN))
            self._seen[shard.index] = now, num_rows
        return self._plan.num_rejected + sum(done for _, done in self._seen.values())
