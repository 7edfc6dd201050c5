"""Batches on a device: copied there, encoded, copied back, without waiting where the device can do without."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Self

import numpy as np
import torch
from torch import Tensor

from sdxl_core.config import LatentsOptions
from sdxl_core.latents.engine.clock import Clock
from sdxl_core.latents.engine.prepare import Prepared
from sdxl_core.latents.vae import EncodeFunction, LoadFunction, compiled


@dataclass(frozen=True, slots=True)
class Encoded:
    """A batch's results on the host.

    values:  float32 [k, B, 4, h / 8, w / 8]: latents, then those of the mirrored pictures (`flip_aug`); or means and
             logarithms of variances (`logvar`).
    finite:  of each picture, whether all its values are.
    notes:   `halved`, `float32`.
    """

    values: Tensor
    finite: tuple[bool, ...]
    notes: tuple[str, ...]


Staged = tuple[Tensor, Tensor]  # on the host, see `_stage`
Span = tuple[str, torch.cuda.Event, torch.cuda.Event]


@dataclass(slots=True)
class Ticket:
    """A batch on the device. Until `ready` has happened, `values` and `finite` are being written to."""

    values: Tensor
    finite: Tensor
    notes: list[str]
    ready: torch.cuda.Event | None
    spans: list[Span]


@dataclass(frozen=True, slots=True)
class Job:
    """A batch under way."""

    batch: Sequence[Prepared]
    staged: Staged
    ticket: Future[Ticket]


class Device:
    """One device and the VAE on it. `submit` batches, then `finish` them in the same order; close it with `with`.

    On a card, copying to it, computing and copying back have a stream each, so that while a batch is computed the next
    one travels. On the CPU a thread computes. Either way `in_flight` batches keep it busy.
    """

    def __init__(
        self, options: LatentsOptions, device: torch.device, load: LoadFunction, *, batch_size: int, clock: Clock
    ) -> None:
        self._options, self._device, self._load = options, device, load
        self._batch_size, self._clock = batch_size, clock
        on_card = device.type == "cuda"
        self._upload = torch.cuda.Stream(self._device) if on_card else None  # type: ignore[no-untyped-call]
        self._download = torch.cuda.Stream(self._device) if on_card else None  # type: ignore[no-untyped-call]
        self._limits: dict[tuple[int, int, str], int] = {}  # height, width, dtype: most pictures that fit
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="device")
        self.in_flight = 2 if on_card else 1

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self._thread.shutdown(cancel_futures=True)

    def submit(self, batch: Sequence[Prepared]) -> Job:
        """Begin to encode a batch of one bucket."""
        with self._clock.working("transfer"):
            staged = _stage(batch, pinned=self._upload is not None)
        return Job(batch, staged, self._thread.submit(self._encode, staged, self._options.dtype))

    def finish(self, job: Job) -> Encoded:
        """Wait for a batch; one that overflowed in half precision is encoded again in float32.

        Raises: torch.OutOfMemoryError: a single picture does not fit.
        """
        ticket = job.ticket.result()
        self._wait(ticket)
        notes = ticket.notes
        if self._options.dtype != "float32" and not ticket.finite.all():
            ticket = self._thread.submit(self._encode, job.staged, "float32").result()
            self._wait(ticket)
            notes = [*notes, "float32", *ticket.notes]
        return Encoded(ticket.values, tuple(ticket.finite.tolist()), tuple(notes))

    def _wait(self, ticket: Ticket) -> None:
        if ticket.ready is not None:
            ticket.ready.synchronize()
            for stage, first, last in ticket.spans:
                self._clock.add(stage, first.elapsed_time(last) / 1000)
            ticket.ready = None

    @torch.inference_mode()
    def _encode(self, staged: Staged, dtype: str) -> Ticket:
        """One ticket for the batch, in as many pieces as the memory asks for. Runs on the device's thread."""
        pixels, noise = staged
        size, height, width = pixels.shape[:3]
        limit = self._limits.get((height, width, dtype), size)
        if size <= limit:
            try:
                return self._send(staged, dtype)
            except torch.OutOfMemoryError:
                if size == 1:
                    raise
                limit = self._limits[height, width, dtype] = size // 2
            if self._device.type == "cuda":  # outside the handler, whose traceback holds on to tensors
                torch.cuda.synchronize(self._device)
                torch.cuda.empty_cache()
        parts = [slice(start, start + limit) for start in range(0, size, limit)]
        pieces = [self._encode((pixels[part], noise[:, part]), dtype) for part in parts]
        for piece in pieces:
            self._wait(piece)
        values = torch.cat([piece.values for piece in pieces], dim=1)
        finite = torch.cat([piece.finite for piece in pieces])
        notes = ["halved", *(note for piece in pieces for note in piece.notes if note != "halved")]
        return Ticket(values, finite, notes, None, [])

    def _send(self, staged: Staged, dtype: str) -> Ticket:
        """Copy there, compute, copy back; on a card all of it is only queued."""
        encode = self._load(self._options.vae, dtype, self._device)
        if self._options.compile and len(staged[0]) == self._batch_size and dtype == self._options.dtype:
            encode = compiled(encode)
        spans: list[Span] = []
        with self._span("transfer", self._upload, spans):
            pixels, noise = (tensor.to(self._device, non_blocking=True) for tensor in staged)
        self._after(self._upload, None, pixels, noise)
        with self._span("vae", None, spans):
            values, finite = _compute(encode, pixels, noise, self._options)
        self._after(None, self._download, values, finite)
        with self._span("transfer", self._download, spans):
            host = [self._to_host(tensor) for tensor in (values, finite)]
        ready = spans[-1][2] if spans else None
        return Ticket(host[0], host[1], [], ready, spans)

    def _to_host(self, tensor: Tensor) -> Tensor:
        if self._download is None:
            return tensor
        host = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
        return host.copy_(tensor, non_blocking=True)

    def _after(self, first: torch.cuda.Stream | None, then: torch.cuda.Stream | None, *tensors: Tensor) -> None:
        """On a card: `then` begins when `first` has come this far (None: the stream that computes), and the allocator
        keeps the tensors until `then` is done with them."""
        if self._device.type != "cuda":
            return
        compute = torch.cuda.current_stream(self._device)
        later = then or compute
        later.wait_stream(first or compute)
        for tensor in tensors:
            tensor.record_stream(later)

    def _span(self, stage: str, stream: torch.cuda.Stream | None, spans: list[Span]) -> AbstractContextManager[object]:
        """Measure a stage: on the CPU its time here, on a card the time between two events on the stream."""
        if self._device.type != "cuda":
            return self._clock.working(stage)
        return _Span(stage, stream, spans)


class _Span:
    """Queue the block's work on a stream (None: the one that computes), between two events."""

    def __init__(self, stage: str, stream: torch.cuda.Stream | None, spans: list[Span]) -> None:
        self._stage, self._spans = stage, spans
        self._context: AbstractContextManager[object] = nullcontext() if stream is None else torch.cuda.stream(stream)
        self._first, self._last = (
            torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
            for _ in range(2)
        )

    def __enter__(self) -> None:
        self._context.__enter__()
        self._first.record()

    def __exit__(self, *exc: object) -> None:
        self._last.record()
        self._context.__exit__(None, None, None)
        self._spans.append((self._stage, self._first, self._last))


def _stage(batch: Sequence[Prepared], *, pinned: bool) -> tuple[Tensor, Tensor]:
    """Pixels uint8 [B, h, w, 3] and noise float32 [s, B, 4, h / 8, w / 8] on the host, s as in `Prepared.noise`."""
    height, width = batch[0].pixels.shape[:2]
    pixels = torch.empty((len(batch), height, width, 3), dtype=torch.uint8, pin_memory=pinned)
    noise = torch.empty((len(batch[0].noise), len(batch), 4, height // 8, width // 8), pin_memory=pinned)
    for row, item in enumerate(batch):
        np.copyto(pixels[row].numpy(), item.pixels)
        for side, values in enumerate(item.noise):
            noise[side, row] = values
    return pixels, noise


def _compute(encode: EncodeFunction, pixels: Tensor, noise: Tensor, options: LatentsOptions) -> tuple[Tensor, Tensor]:
    """uint8 [B, h, w, 3] to float32 [k, B, 4, h / 8, w / 8] as in `Encoded`, and bool [B]."""
    mean, logvar = encode(pixels)
    values = [mean.float(), logvar.float()] if options.logvar else [_sample(mean, logvar, noise[0])]
    if options.flip_aug:
        values.append(_sample(*encode(pixels.flip(2)), noise[1]))
    stacked = torch.stack(values)
    return stacked, torch.isfinite(stacked).all(dim=0).flatten(1).all(dim=1)


def _sample(mean: Tensor, logvar: Tensor, noise: Tensor) -> Tensor:
    return mean.float() + torch.exp(0.5 * logvar).float() * noise
