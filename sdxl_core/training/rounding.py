"""float32 to bfloat16 by stochastic rounding: right on average, so updates below half a bf16 step are not lost.

The 16 random bits of an element are a hash of (key, index of the element): no generator state, the same on every
device, and any slice of a tensor can be rounded alone. Measured in tests/training/test_stochastic_rounding.py.
"""

from __future__ import annotations

import torch
from torch import Tensor

CHUNK_ELEMENTS = {"cpu": 1 << 17, "cuda": 1 << 25}
_MULTIPLIER_1, _MULTIPLIER_2 = 0x7FEB352D, 0x846CA68B - (1 << 32)  # lowbias32, github.com/skeeto/hash-prospector


def round_into(target: Tensor, values: Tensor, *, key: int) -> None:
    """Write `values` (float32) into `target` (bfloat16, same shape, contiguous), rounding up or down at random.

    P(up) is the distance from the lower neighbour in units of the gap, so the expected result is `values`; values
    that bf16 can represent stay what they are. `values` is overwritten. `key`: 64 bits, one a tensor and step.
    """
    flat_target, flat_values = target.view(-1), values.view(-1)
    size = CHUNK_ELEMENTS.get(values.device.type, CHUNK_ELEMENTS["cuda"])
    for start in range(0, flat_values.numel(), size):
        chunk = flat_values[start : start + size]
        bits = chunk.view(torch.int32)
        bits += random_16_bits(chunk.numel(), start=start, key=key, device=values.device)
        bits &= -0x10000
        flat_target[start : start + size] = chunk


def random_16_bits(count: int, *, start: int, key: int, device: torch.device) -> Tensor:
    """Uniform integers in [0, 65536) for elements start … start + count of a tensor, int32 [count]. `start`: even."""
    words = torch.arange(start // 2, start // 2 + -(-count // 2), dtype=torch.int32, device=device)
    scratch = torch.empty_like(words)
    words += _signed(key)
    _mix(words, scratch)
    words ^= _signed(key >> 32)
    _mix(words, scratch)
    halves = words.view(torch.int16)[:count].to(torch.int32)
    halves &= 0xFFFF
    return halves


def _mix(words: Tensor, scratch: Tensor) -> None:
    _xor_shift(words, 16, scratch)
    words *= _MULTIPLIER_1
    _xor_shift(words, 15, scratch)
    words *= _MULTIPLIER_2
    _xor_shift(words, 16, scratch)


def _xor_shift(words: Tensor, by: int, scratch: Tensor) -> None:
    torch.bitwise_right_shift(words, by, out=scratch)
    scratch &= (1 << (32 - by)) - 1  # int32 shifts copy the sign; hashes want zeros
    words ^= scratch


def _signed(value: int) -> int:
    low = value & 0xFFFFFFFF
    return low - (1 << 32) if low >= 1 << 31 else low
