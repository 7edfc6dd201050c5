"""The engine: groups of pictures in, groups of latents out, every stage at work at once.

One thread reads in order, a pool decodes, this thread fills batches and feeds the device, one thread commits. Batches
are a pure function of a group's pictures, because a VAE's output depends on the batch it is in.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial

import numpy as np
import torch
from numpy.typing import NDArray

from sdxl_core.buckets import BucketTable, crop_ltrb
from sdxl_core.config import CacheLatentsConfig, LatentsOptions
from sdxl_core.devices import cores_of_slot
from sdxl_core.images.decode import BadPicture
from sdxl_core.latents.engine.batch_size import settled_batch_size
from sdxl_core.latents.engine.batches import batches_of
from sdxl_core.latents.engine.clock import Clock
from sdxl_core.latents.engine.device import Device, Job
from sdxl_core.latents.engine.feed import Feed, Outcome
from sdxl_core.latents.engine.heap import keep_freed_memory
from sdxl_core.latents.engine.prepare import Prepared, prepare
from sdxl_core.latents.engine.records import EncodedGroup, EncodedPicture, EngineReport, Picture, Rejection
from sdxl_core.latents.engine.writer import Commit, Write, Writer
from sdxl_core.latents.formats import LatentRecord
from sdxl_core.latents.vae import LoadFunction, load_encoder


@dataclass(slots=True)
class _Group:
    """A group under way. `order`: keys in the group's order."""

    number: int
    order: list[str] = field(default_factory=list)
    pictures: dict[str, EncodedPicture] = field(default_factory=dict)
    rejected: dict[str, Rejection] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    def done(self) -> EncodedGroup:
        return EncodedGroup(
            number=self.number,
            pictures=tuple(self.pictures[key] for key in self.order if key in self.pictures),
            rejected=tuple(self.rejected[key] for key in self.order if key in self.rejected),
            notes=tuple(self.notes),
        )


class Engine:
    """Encodes groups of pictures on one device.

    Args:   config: with `batch_size` 0 the first run into `out` finds it out, and later ones keep to it.
            device: `cpu`, or a card's number, which this process sees as cuda:0; after a machine's name and a colon
            where there are several.
            load: gives the VAE's encoder; another one for measuring.
    """

    def __init__(self, config: CacheLatentsConfig, device: str, *, load: LoadFunction = load_encoder) -> None:
        self._config, self._load = config, load
        self._device = torch.device("cpu" if device.rpartition(":")[2] == "cpu" else "cuda:0")
        self._threads = config.decode_threads or cores_of_slot()
        self._table = BucketTable.from_options(config)

    def run(
        self, groups: Iterable[tuple[int, Sequence[Picture]]], commit: Commit, write: Write | None = None
    ) -> EngineReport:
        """Encode every group, and call `commit` for each in order, on a thread of its own.

        `groups` is read ahead, on another thread. A picture that cannot be used is among its group's rejected. No
        picture is encoded before the group before its own is committed.

        Args:   write: called before that with each batch as soon as it is encoded, on the thread of `commit`.
        Raises: what `groups` and `commit` raise; everything committed before stays.
                torch.OutOfMemoryError: a single picture does not fit.   ConfigError, CheckpointError: no such VAE.
        """
        keep_freed_memory()
        batch_size = settled_batch_size(self._config, self._device, self._load)
        clock = Clock(self._threads)
        ahead = 3 * self._threads + 2 * batch_size
        prepare_one = partial(prepare, table=self._table, options=self._config)
        with (
            Writer(commit, write, clock) as writer,
            Feed(groups, prepare_one, threads=self._threads, ahead=ahead, clock=clock) as feed,
            Device(self._config, self._device, self._load, batch_size=batch_size, clock=clock) as device,
        ):
            self._run(feed, device, writer, batch_size)
        return clock.report(num_encoded=writer.num_encoded, num_rejected=writer.num_rejected)

    def _run(self, feed: Feed, device: Device, writer: Writer, batch_size: int) -> None:
        """A group's first batch waits until the group before it is committed, so that a crash costs the encoding of one
        group and no more; reading and decoding go on meanwhile."""
        for number, pictures in feed.groups():
            group = _Group(number)
            under_way: deque[Job] = deque()
            for batch in batches_of(_usable(pictures, group), batch_size):
                if not under_way:
                    writer.wait()
                under_way.append(device.submit(batch))
                if len(under_way) > device.in_flight:
                    writer.put_batch(number, self._finish(group, device, under_way.popleft()))
            while under_way:
                writer.put_batch(number, self._finish(group, device, under_way.popleft()))
            writer.put(group.done())

    def _finish(self, group: _Group, device: Device, job: Job) -> list[EncodedPicture]:
        """A batch's pictures, which are noted in the group as well."""
        encoded = device.finish(job)
        kept = []
        group.notes += encoded.notes
        for row, item in enumerate(job.batch):
            key = item.picture.key
            if encoded.finite[row]:
                kept.append(_picture(item, encoded.values[:, row].numpy().copy(), self._config))
                group.pictures[key] = kept[-1]
            else:
                detail = "the VAE gives values that are not finite, in float32 too"
                group.rejected[key] = (key, "nan_latent", detail)
        return kept


def _usable(pictures: Iterator[tuple[Picture, Outcome]], group: _Group) -> Iterator[Prepared]:
    """The pictures that can be encoded; the others are noted as rejected."""
    for picture, outcome in pictures:
        group.order.append(picture.key)
        if isinstance(outcome, BadPicture):
            group.rejected[picture.key] = (picture.key, outcome.reason, str(outcome))
        else:
            yield outcome


def _picture(item: Prepared, values: NDArray[np.float32], options: LatentsOptions) -> EncodedPicture:
    """`values`: [k, 4, h / 8, w / 8] in memory of its own, so that the batch's can be let go."""
    size, bucket = item.size, item.choice.bucket
    record = LatentRecord(
        latents=values[0],
        latents_flipped=values[1] if options.flip_aug else None,
        logvar=values[1] if options.logvar else None,
        alpha_mask=item.alpha,
        original_width_px=size.width_px,
        original_height_px=size.height_px,
        crop_ltrb=crop_ltrb(bucket, width_px=size.width_px, height_px=size.height_px),
        image_sha256=item.digest,
    )
    return EncodedPicture(picture=item.picture, record=record, bucket=bucket, ar_error=item.choice.ar_error)
