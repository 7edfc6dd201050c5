"""Saved pieces of weights and optimizer states, put together for another division among processes.

Elementwise tensors move exactly. 8-bit states are quantised in blocks of 256 elements from a piece's first one on, so
other pieces have other blocks: they are dequantised, joined, cut and quantised again, and the error is measured.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from sdxl_core.errors import CheckpointError
from sdxl_core.training.parallel import Piece
from sdxl_core.training.state import Generation, Snapshot

BLOCK = 256  # bitsandbytes' block of elements with one scale
SIGNED = {"state1": True, "state2": False}  # second moments are never negative


@dataclass(slots=True)
class Requantised:
    """How far requantised states are from what was saved: sums of squares over all of their elements."""

    error: float = 0.0
    total: float = 0.0

    @property
    def relative_error(self) -> float:
        """Root-mean-square error over root-mean-square value; 0 where nothing was quantised again."""
        return (self.error / self.total) ** 0.5 if self.total else 0.0


def gather_piece(generation: Generation, file: str, name: str, wanted: Piece) -> Tensor:
    """Elements of an elementwise tensor (weights, averages) by its name: flat, [wanted.count].

    Raises: CheckpointError: the saved pieces do not cover it.
    """
    return _joined([(_piece(part, name, part.tensors[file][name]), part.tensors[file][name])
                    for part in generation.parts if name in part.tensors[file]], wanted, name)  # fmt: skip


def optimizer_states(
    generation: Generation, wanted: Mapping[str, Piece], shapes: Mapping[str, Sequence[int]]
) -> tuple[dict[str, Tensor], dict[str, dict[str, Any]], Requantised]:
    """The states of the parameters in `wanted`, as `SlotOptimizer.load_state` takes them.

    `shapes`: of what this process holds of each. Raises: CheckpointError: states that cannot be divided otherwise.
    """
    tensors: dict[str, Tensor] = {}
    numbers: dict[str, dict[str, Any]] = {}
    measured = Requantised()
    index = [_by_parameter(part) for part in generation.parts]
    for name, piece in wanted.items():
        if piece.count == 0:
            continue
        whole = Piece(offset=0, count=piece.total, total=piece.total)
        saved = [(part.pieces.get(name, whole), states[name], part.numbers.get(name, {}))
                 for part, states in zip(generation.parts, index, strict=True) if name in states]  # fmt: skip
        if not saved:
            continue
        numbers[name] = dict(saved[0][2])
        same = [states for at, states, _ in saved if at == piece]
        found = same[0] if same else dict(_resharded(name, [(at, s) for at, s, _ in saved], piece, measured))
        for key, value in found.items():
            elementwise = not same and value.numel() == piece.count
            tensors[f"{name}/{key}"] = value.reshape(tuple(shapes[name])) if elementwise else value
    return tensors, numbers, measured


def _by_parameter(part: Snapshot) -> dict[str, dict[str, Tensor]]:
    states: dict[str, dict[str, Tensor]] = {name: {} for name in part.numbers}
    for path, value in part.tensors["optimizer"].items():
        name, _, key = path.rpartition("/")
        states.setdefault(name, {})[key] = value
    return states


def _piece(part: Snapshot, name: str, tensor: Tensor) -> Piece:
    return part.pieces.get(name) or Piece(offset=0, count=tensor.numel(), total=tensor.numel())


def _resharded(
    name: str, saved: list[tuple[Piece, dict[str, Tensor]]], wanted: Piece, measured: Requantised
) -> Iterator[tuple[str, Tensor]]:
    saved = [(at, states) for at, states in saved if at.count]
    for key, first in saved[0][1].items():
        pieces = [(at, states[key]) for at, states in saved]
        scale = key.replace("state", "absmax")
        if key.startswith("absmax"):
            continue
        if first.dim() == 0:
            yield key, first
        elif any(value.numel() != at.count for at, value in pieces):
            raise CheckpointError(
                f"the optimizer state {key!r} of {name} cannot be divided among another number of processes. Continue "
                f"with as many processes as before, or train into another out folder."
            )
        elif first.dtype == torch.uint8 and scale in saved[0][1]:
            codes = code_book(signed=SIGNED[key])
            floats = [(at, dequantise(states[key], states[scale], codes)) for at, states in saved]
            values = _joined(floats, wanted, name)
            quantised, absmax = quantise(values, codes)
            measured.error += float((dequantise(quantised, absmax, codes) - values).double().square().sum())
            measured.total += float(values.double().square().sum())
            yield key, quantised
            yield scale, absmax
        else:
            yield key, _joined(pieces, wanted, name)


def _joined(pieces: list[tuple[Piece, Tensor]], wanted: Piece, name: str) -> Tensor:
    if not wanted.count:
        return pieces[0][1].new_empty(0)
    parts, reached = [], wanted.offset
    for at, tensor in sorted(pieces, key=lambda pair: pair[0].offset):
        start, stop = max(reached, at.offset), min(wanted.offset + wanted.count, at.offset + at.count)
        if start == reached and stop > start:
            parts.append(tensor.reshape(-1)[start - at.offset : stop - at.offset])
            reached = stop
    if reached != wanted.offset + wanted.count:
        raise CheckpointError(f"{name}: the saved state does not hold all of it. Start again in another out folder.")
    return torch.cat(parts) if len(parts) != 1 else parts[0]


def code_book(*, signed: bool) -> Tensor:
    """The 256 values of bitsandbytes' dynamic 8-bit numbers, float32, ascending."""
    from bitsandbytes.functional import create_dynamic_map

    codes: Tensor = create_dynamic_map(signed=signed)
    return codes


def dequantise(quantised: Tensor, absmax: Tensor, codes: Tensor) -> Tensor:
    """uint8 [n] and a scale a block of 256 -> float32 [n]."""
    flat = quantised.reshape(-1)
    return codes[flat.long()] * absmax.repeat_interleave(BLOCK)[: flat.numel()]


def quantise(values: Tensor, codes: Tensor) -> tuple[Tensor, Tensor]:
    """float32 [n] -> the nearest codes, uint8 [n], and the largest magnitude of each block of 256, float32."""
    count = values.numel()
    padded = torch.nn.functional.pad(values, (0, -count % BLOCK)).view(-1, BLOCK)
    absmax = padded.abs().amax(dim=1)
    scaled = padded / absmax.clamp(min=torch.finfo(torch.float32).tiny).unsqueeze(1)
    middles = (codes[1:] + codes[:-1]) / 2
    return torch.bucketize(scaled, middles).to(torch.uint8).view(-1)[:count], absmax
