"""Batches on a device: copied there, encoded, copied back, without waiting where the device can do without."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from sdxl_core.config import LatentsOptions
from sdxl_core.latents.engine.clock import Clock
from sdxl_core.latents.engine.prepare import Prepared
from sdxl_core.latents.vae import DTYPES, EncodeFunction, LoadFunction, compiled


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


@dataclass(slots=True)
class Ticket:
    """A batch under way. Until `ready` has happened, `values` and `finite` are being written to."""

    batch: Sequence[Prepared]
    values: Tensor
    finite: Tensor
    notes: list[str]
    ready: torch.cuda.Event | None
    spans: list[tuple[str, torch.cuda.Event, torch.cuda.Event]]


class Device:
    """One device and the VAE on it. `submit` batches, then `finish` them in the same order.

    On a card, copying to it, computing and copying back have a stream each, so that while a batch is computed the next
    one travels; `in_flight` batches keep it busy. On the CPU `submit` does everything.
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
        self.in_flight = 2 if on_card else 0

    @torch.inference_mode()
    def submit(self, batch: Sequence[Prepared]) -> Ticket:
        """Begin to encode a batch of one bucket. Raises: torch.OutOfMemoryError: a single picture does not fit."""
        return self._encode(batch, self._options.dtype)

    @torch.inference_mode()
    def finish(self, ticket: Ticket) -> Encoded:
        """Wait for a batch; one that overflowed in half precision is encoded again in float32.

        Raises: torch.OutOfMemoryError: a single picture does not fit.
        """
        self._wait(ticket)
        if self._options.dtype != "float32" and not ticket.finite.all():
            again = self._encode(ticket.batch, "float32")
            self._wait(again)
            ticket.values, ticket.finite = again.values, again.finite
            ticket.notes += ["float32", *again.notes]
        return Encoded(ticket.values, tuple(ticket.finite.tolist()), tuple(ticket.notes))

    def _wait(self, ticket: Ticket) -> None:
        if ticket.ready is not None:
            ticket.ready.synchronize()
            for stage, first, last in ticket.spans:
                self._clock.add(stage, first.elapsed_time(last) / 1000)
            ticket.ready = None

    def _encode(self, batch: Sequence[Prepared], dtype: str) -> Ticket:
        """One ticket for the batch, in as many pieces as the memory asks for."""
        height, width = batch[0].pixels.shape[:2]
        limit = self._limits.get((height, width, dtype), len(batch))
        if len(batch) <= limit:
            try:
                return self._send(batch, dtype)
            except torch.OutOfMemoryError:
                if len(batch) == 1:
                    raise
                limit = self._limits[height, width, dtype] = len(batch) // 2
            if self._device.type == "cuda":  # outside the handler, whose traceback holds on to tensors
                torch.cuda.synchronize(self._device)
                torch.cuda.empty_cache()
        pieces = [self._encode(batch[start : start + limit], dtype) for start in range(0, len(batch), limit)]
        for piece in pieces:
            self._wait(piece)
        values = torch.cat([piece.values for piece in pieces], dim=1)
        finite = torch.cat([piece.finite for piece in pieces])
        notes = ["halved", *(note for piece in pieces for note in piece.notes if note != "halved")]
        return Ticket(batch, values, finite, notes, None, [])

    def _send(self, batch: Sequence[Prepared], dtype: str) -> Ticket:
        """Copy there, compute, copy back; on a card all of it is only queued."""
        encode = self._load(self._options.vae, dtype, self._device)
        if self._options.compile and len(batch) == self._batch_size and dtype == self._options.dtype:
            encode = compiled(encode)
        spans: list[tuple[str, torch.cuda.Event, torch.cuda.Event]] = []
        with self._clock.working("transfer"):
            staged = _stage(batch, pinned=self._upload is not None)
        with self._span("transfer", self._upload, spans):
            pixels, noise = (tensor.to(self._device, non_blocking=True) for tensor in staged)
        self._after(self._upload, None, pixels, noise)
        with self._span("vae", None, spans):
            values, finite = _compute(encode, pixels, noise, DTYPES[dtype], self._options)
        self._after(None, self._download, values, finite)
        with self._span("transfer", self._download, spans):
            host = [self._to_host(tensor) for tensor in (values, finite)]
        ready = spans[-1][2] if spans else None
        return Ticket(batch, host[0], host[1], [], ready, spans)

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

    def _span(
        self, stage: str, stream: torch.cuda.Stream | None, spans: list[tuple[str, torch.cuda.Event, torch.cuda.Event]]
    ) -> AbstractContextManager[object]:
        """Measure a stage: on the CPU its time here, on a card the time between two events on the stream."""
        if self._device.type != "cuda":
            return self._clock.working(stage)
        return _Span(stage, stream, spans)


class _Span:
    """Queue the block's work on a stream (None: the one that computes), between two events."""

    def __init__(
        self, stage: str, stream: torch.cuda.Stream | None, spans: list[tuple[str, torch.cuda.Event, torch.cuda.Event]]
    ) -> None:
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


def _compute(
    encode: EncodeFunction, pixels: Tensor, noise: Tensor, dtype: torch.dtype, options: LatentsOptions
) -> tuple[Tensor, Tensor]:
    """uint8 [B, h, w, 3] to float32 [k, B, 4, h / 8, w / 8] as in `Encoded`, and bool [B]."""
    images = pixels.permute(0, 3, 1, 2).float().div_(255).sub_(0.5).div_(0.5)
    images = images.to(dtype, memory_format=torch.channels_last)
    mean, logvar = encode(images)
    values = [mean.float(), logvar.float()] if options.logvar else [_sample(mean, logvar, noise[0])]
    if options.flip_aug:
        mirrored = images.flip(3).contiguous(memory_format=torch.channels_last)
        values.append(_sample(*encode(mirrored), noise[1]))
    stacked = torch.stack(values)
    return stacked, torch.isfinite(stacked).all(dim=0).flatten(1).all(dim=1)


def _sample(mean: Tensor, logvar: Tensor, noise: Tensor) -> Tensor:
    return mean.float() + torch.exp(0.5 * logvar).float() * noise
