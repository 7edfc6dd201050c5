"""How processes share the work: alone, DDP (each holds everything) or FSDP2 (each holds its part of every weight).

Under FSDP2 a weight of n rows lies in pieces of ceil(n / processes) rows; gradients and optimizer states are divided
alike. A *piece* is named by its place in the flattened weight, so that rounding noise, states on disk and 8-bit blocks
know where they are whatever the number of processes.
"""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

SHARDED_BLOCKS = ("BasicTransformerBlock", "ResnetBlock2D", "CLIPEncoderLayer", "CLIPTextEmbeddings")
DDP_BUCKET_MIB = 25


@dataclass(frozen=True, slots=True, kw_only=True)
class Piece:
    """Elements offset … offset + count of a flattened weight of `total` elements: what one process holds of it."""

    offset: int
    count: int
    total: int


def piece_of_shape(shape: tuple[int, ...], *, rank: int, num_ranks: int) -> Piece:
    """Which elements `rank` holds of a weight that is divided by rows, as FSDP2 divides (torch.chunk's rule)."""
    total = 1
    for side in shape:
        total *= side
    num_rows = shape[0] if shape else 1
    per_rank = -(-num_rows // num_ranks)
    first, last = min(rank * per_rank, num_rows), min((rank + 1) * per_rank, num_rows)
    row = total // max(num_rows, 1)
    return Piece(offset=first * row, count=(last - first) * row, total=total)


def piece_of(parameter: Tensor) -> Piece:
    """Which elements of a parameter this process holds: all, unless FSDP2 has divided it."""
    mesh = getattr(parameter, "device_mesh", None)
    if mesh is None:
        return Piece(offset=0, count=parameter.numel(), total=parameter.numel())
    piece = piece_of_shape(tuple(parameter.shape), rank=mesh.get_local_rank(), num_ranks=mesh.size())
    assert piece.count == local(parameter).numel(), "FSDP2 divides by rows"
    return piece


def local(tensor: Tensor) -> Tensor:
    """What this process holds of a parameter or gradient, sharing its memory."""
    to_local: Any = getattr(tensor, "to_local", None)
    return tensor if to_local is None else to_local()


def sharded_modules(denoiser: nn.Module) -> list[nn.Module]:
    """The modules whose weights FSDP2 gathers together, innermost first: small, so that one gather is small.

    Of the text encoders only the inside: fully_shard replaces a module's class, and transformers finds out by the class
    whether hidden states are kept. bigG's projection is called once more after its encoder is done.
    """
    parts: Any = denoiser
    blocks = [module for module in denoiser.modules() if type(module).__name__ in SHARDED_BLOCKS]
    if not parts.holds_texts:
        return [*blocks, parts.unet, denoiser]
    encoders = [getattr(encoder, "text_model", encoder) for encoder in (parts.text_encoder, parts.text_encoder_2)]
    norms = [encoder.final_layer_norm for encoder in encoders]
    return [*blocks, *norms, parts.text_encoder_2.text_projection, parts.unet, denoiser]


def shard(denoiser: nn.Module, *, device: torch.device) -> None:
    """Divide every weight among all processes, in place. Gradients are exchanged, and kept, in the weights' dtype."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh(device.type, (dist.get_world_size(),))
    for module in sharded_modules(denoiser):
        fully_shard(module, mesh=mesh)


def replicate(denoiser: nn.Module, *, device: torch.device) -> nn.Module:
    """The model under DDP; gradients are views of its buckets, each of at most 25 MiB or one weight."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # broadcast_buffers has another name from torch 2.13 on
        return nn.parallel.DistributedDataParallel(
            denoiser,
            device_ids=[device.index] if device.type == "cuda" else None,
            broadcast_buffers=False,
            gradient_as_bucket_view=True,
            bucket_cap_mb=DDP_BUCKET_MIB,
        )


@contextlib.contextmanager
def without_exchange(model: nn.Module) -> Iterator[None]:
    """Gradients of this backward pass stay here (accumulation under DDP). FSDP2 exchanges always: what it would keep

    otherwise are whole gradients.
    """
    if isinstance(model, nn.parallel.DistributedDataParallel):
        with model.no_sync():
            yield
    else:
        yield


def gradient_norm(parameters: Iterable[nn.Parameter]) -> Tensor:
    """Joint L2 norm of all gradients on all processes, float32 scalar; summed in float32 even where they are bf16."""
    gradients = [p.grad for p in parameters if p.grad is not None]
    norms = [torch.linalg.vector_norm(local(gradient), dtype=torch.float32) for gradient in gradients]
    squared = torch.linalg.vector_norm(torch.stack(norms)).square()
    if any(local(gradient) is not gradient for gradient in gradients):
        dist.all_reduce(squared)
    joint: Tensor = squared.sqrt()
    return joint
