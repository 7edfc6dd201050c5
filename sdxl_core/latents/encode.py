"""Encode one shard: sizes from headers, batches by bucket, decoded ahead in threads, committed in groups.

Batches and groups are a pure function of the shard, because a VAE's output depends on the batch it is in: an
interrupted shard continues with whole groups, so it ends with the same bytes as an undisturbed one.
"""

from __future__ import annotations

import hashlib
import os
import time
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import orjson
import torch
from numpy.typing import NDArray

from sdxl_core.buckets import BucketChoice, BucketTable, crop_ltrb
from sdxl_core.config import CacheLatentsConfig
from sdxl_core.errors import ShardError
from sdxl_core.files import sync_files
from sdxl_core.images.decode import BadPicture, PictureSize, decode, probe
from sdxl_core.images.prepare import choose_bucket, fit_to_bucket
from sdxl_core.latents.formats import LatentRecord, write_per_image
from sdxl_core.latents.ledger import Group, LatentRow, ShardLedger
from sdxl_core.latents.plan import ledger_path
from sdxl_core.latents.vae import Encoder
from sdxl_core.progress import Progress, no_progress
from sdxl_core.refs import LatentShardRef, ShardRef

LOOK_AHEAD_BATCHES = 4
Rejection = tuple[str, str, str]


@dataclass(frozen=True, slots=True, kw_only=True)
class Picture:
    """A picture of the shard that is worth encoding."""

    key: str
    name: str
    size: PictureSize
    choice: BucketChoice

    @property
    def file(self) -> str:
        """Its latents' path below the latents folder."""
        return os.path.splitext(self.name)[0] + ".npz"


@dataclass(frozen=True, slots=True)
class Prepared:
    """Pixels of one picture, uint8 [h, w, 3], the digest of its file, and how long reading and decoding took."""

    pixels: NDArray[np.uint8]
    digest: bytes
    read_s: float
    decode_s: float


class Stopwatch:
    """Seconds by stage. `read` and `decode` happen in threads; `wait` is what of them the VAE had to wait for."""

    def __init__(self) -> None:
        self.seconds = dict.fromkeys(("read", "decode", "wait", "vae", "write"), 0.0)

    def bound_by(self) -> str:
        """The stage that an improvement would have to start with."""
        waited = "read" if self.seconds["read"] > self.seconds["decode"] else "decode"
        return max(("wait", "vae", "write"), key=lambda name: self.seconds[name]).replace("wait", waited)


def shard_is_finished(shard: ShardRef, config: CacheLatentsConfig) -> LatentShardRef | None:
    """A finished shard's reference if every file is as it was written, else None.

    Opens no picture, and latents only where their time differs (a copied cache). The caller holds the output's lock.
    """
    ledger = ShardLedger.read(ledger_path(shard))
    ledger.settle(config.out / "latents")
    return None if ledger.done is None else _reference(shard, ledger)


def encode_shard(
    shard: ShardRef, config: CacheLatentsConfig, device: str, *, progress: Progress = no_progress
) -> LatentShardRef:
    """Encode what the shard's ledger does not know yet. The caller holds the output's lock.

    Args:   device: `cpu`, or a card's number, which this process sees as cuda:0.
    Raises: ShardError: the shard's listing is gone.   DiskFullError: everything committed before is kept.
    """
    finished = shard_is_finished(shard, config)
    if finished is not None:
        progress("latents", finished.num_seen, finished.num_seen)
        return finished
    ledger = ShardLedger.read(ledger_path(shard))
    started, watch = time.monotonic(), Stopwatch()
    pictures, rejected = _select(shard, config)
    groups = groups_of_batches(pictures, config)
    done = len(rejected) + sum(sum(map(len, groups[number])) for number in ledger.groups)
    encoder = Encoder(config.vae, dtype=config.dtype, device=device)
    todo = [(number, batches) for number, batches in enumerate(groups) if number not in ledger.groups]
    num_encoded = 0
    with ThreadPoolExecutor(config.decode_threads) as pool:
        prepared = _prepare_ahead(pool, [batch for _, batches in todo for batch in batches], config)
        for number, batches in todo:
            group = _encode_group(number, batches, prepared, encoder, config, watch)
            ledger.add(group)
            num_encoded += len(group.rows)
            done += sum(map(len, batches))
            progress("latents", done, shard.stop - shard.start)
    elapsed = time.monotonic() - started
    ledger.close(
        {
            "rejected": rejected,
            "images_per_s": num_encoded / elapsed if elapsed else 0.0,
            "seconds": {name: round(value, 3) for name, value in watch.seconds.items()},
            "bound_by": watch.bound_by(),
            "device": device,
        }
    )
    return _reference(shard, ledger)


def _select(shard: ShardRef, config: CacheLatentsConfig) -> tuple[list[Picture], list[Rejection]]:
    """Read every picture's header: those worth encoding, in the shard's order, and the others with the reason."""
    try:
        rows: list[list[Any]] = orjson.loads(shard.path.read_bytes())
    except (FileNotFoundError, orjson.JSONDecodeError) as error:
        shard.path.unlink(missing_ok=True)
        raise ShardError(
            f"{shard.path}: the listing of shard {shard.index} is gone or damaged. Run cache-latents again."
        ) from error
    table = BucketTable.from_options(config)
    pictures: list[Picture] = []
    rejected: list[Rejection] = []
    for row in rows:
        if len(row) == 3:
            rejected.append((row[0], row[1], row[2]))
            continue
        key, name = row[0], row[1]
        try:
            size = probe(config.source / name, honour_exif=config.compat != "sd-scripts")
            choice = choose_bucket(size, table, config)
        except FileNotFoundError:
            rejected.append((key, "missing_image", f"{name} was there when the run was planned, and is gone"))
        except BadPicture as error:
            rejected.append((key, error.reason, str(error)))
        else:
            pictures.append(Picture(key=key, name=name, size=size, choice=choice))
    return pictures, rejected


def groups_of_batches(pictures: Iterable[Picture], config: CacheLatentsConfig) -> list[list[list[Picture]]]:
    """Batches of one bucket each, bucket by bucket, and commit groups of at least commit_size pictures."""
    ordered = sorted(pictures, key=lambda picture: picture.choice.bucket)  # stable: the shard's order inside a bucket
    batches: list[list[Picture]] = []
    for picture in ordered:
        if batches and len(batches[-1]) < config.batch_size and batches[-1][0].choice.bucket == picture.choice.bucket:
            batches[-1].append(picture)
        else:
            batches.append([picture])
    groups: list[list[list[Picture]]] = []
    size = config.commit_size
    for batch in batches:
        if size >= config.commit_size:
            groups.append([])
            size = 0
        groups[-1].append(batch)
        size += len(batch)
    return groups


def _prepare(picture: Picture, config: CacheLatentsConfig) -> Prepared:
    started = time.monotonic()
    try:
        data = (config.source / picture.name).read_bytes()
    except OSError as error:
        raise BadPicture("unreadable", f"{picture.name} cannot be read: {error.strerror}") from error
    read = time.monotonic()
    image = decode(data, compat=config.compat, background=config.background)
    if image.shape[:2] != (picture.size.height_px, picture.size.width_px):
        raise BadPicture("undecodable", "its pixels are of another size than its header says")
    pixels = fit_to_bucket(image, picture.choice)
    return Prepared(pixels, hashlib.sha256(data).digest(), read - started, time.monotonic() - read)


def _prepare_ahead(
    pool: ThreadPoolExecutor, batches: list[list[Picture]], config: CacheLatentsConfig
) -> Iterator[list[Future[Prepared]]]:
    """Futures of every batch in order, with a bounded number of batches under way."""
    ahead: deque[list[Future[Prepared]]] = deque()
    for batch in batches:
        ahead.append([pool.submit(_prepare, picture, config) for picture in batch])
        if len(ahead) > LOOK_AHEAD_BATCHES:
            yield ahead.popleft()
    yield from ahead


def _encode_group(
    number: int,
    batches: list[list[Picture]],
    prepared: Iterator[list[Future[Prepared]]],
    encoder: Encoder,
    config: CacheLatentsConfig,
    watch: Stopwatch,
) -> Group:
    rows: list[LatentRow] = []
    rejected: list[Rejection] = []
    notes: list[str] = []
    for batch in batches:
        usable: list[tuple[Picture, Prepared]] = []
        for picture, future in zip(batch, next(prepared), strict=True):
            started = time.monotonic()
            try:
                usable.append((picture, future.result()))
            except BadPicture as error:
                rejected.append((picture.key, error.reason, str(error)))
            watch.seconds["wait"] += time.monotonic() - started
        if usable:
            notes += _encode_batch(usable, encoder, config, watch, rows, rejected)
    started = time.monotonic()
    sync_files([config.out / "latents" / row.file for row in rows])
    watch.seconds["write"] += time.monotonic() - started
    return Group(number=number, rows=tuple(rows), rejected=tuple(rejected), notes=tuple(notes))


def _encode_batch(
    usable: list[tuple[Picture, Prepared]],
    encoder: Encoder,
    config: CacheLatentsConfig,
    watch: Stopwatch,
    rows: list[LatentRow],
    rejected: list[Rejection],
) -> list[str]:
    """Encode and write one batch, adding to `rows` and `rejected`. Returns the encoder's notes."""
    watch.seconds["read"] += sum(item.read_s for _, item in usable)
    watch.seconds["decode"] += sum(item.decode_s for _, item in usable)
    started = time.monotonic()
    pixels = np.stack([item.pixels for _, item in usable])
    latents, notes = encoder.encode(pixels, [item.digest for _, item in usable], seed=config.seed)
    finite = torch.isfinite(latents).all(dim=(1, 2, 3)).tolist()
    watch.seconds["vae"] += time.monotonic() - started
    started = time.monotonic()
    for (picture, _), values, is_finite in zip(usable, latents.numpy(), finite, strict=True):
        if is_finite:
            rows.append(_write(picture, values, config.out / "latents"))
        else:
            rejected.append((picture.key, "nan_latent", "the VAE gives values that are not finite, in float32 too"))
    watch.seconds["write"] += time.monotonic() - started
    return notes


def _write(picture: Picture, latents: NDArray[np.float32], folder: Path) -> LatentRow:
    width_px, height_px = picture.size.width_px, picture.size.height_px
    bucket = picture.choice.bucket
    record = LatentRecord(
        latents=latents,
        original_width_px=width_px,
        original_height_px=height_px,
        crop_ltrb=crop_ltrb(bucket, width_px=width_px, height_px=height_px),
    )
    path = folder / picture.file
    write_per_image(path, record)
    status = path.stat()
    return LatentRow(
        key=picture.key,
        file=picture.file,
        num_bytes=status.st_size,
        mtime_ns=status.st_mtime_ns,
        crc32=record.crc32(),
        bucket=(bucket.width_px, bucket.height_px),
        ar_error=picture.choice.ar_error,
    )


def _reference(shard: ShardRef, ledger: ShardLedger) -> LatentShardRef:
    assert ledger.done is not None
    num_kept, num_rejected = len(ledger.rows()), len(ledger.rejected())
    if num_kept + num_rejected != shard.stop - shard.start:
        raise ShardError(
            f"{ledger.path}: tells of {num_kept} kept and {num_rejected} rejected pictures, and there are "
            f"{shard.stop - shard.start}. Delete this file and run cache-latents again."
        )
    return LatentShardRef(
        index=shard.index,
        digest=shard.digest,
        ledger=ledger.path,
        num_seen=shard.stop - shard.start,
        num_kept=num_kept,
        num_rejected=num_rejected,
        images_per_s=ledger.done["images_per_s"],
        bound_by=ledger.done["bound_by"],
        device=ledger.done["device"],
        seconds=ledger.done["seconds"],
    )
