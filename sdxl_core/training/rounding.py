"""Updates below half a bf16 step are not lost: by stochastic rounding, or by keeping what rounding left over.

Stochastic rounding is right on average and needs no memory. The 16 random bits of an element are a hash of (key of the
step, position of the element among all parameters): no generator state, the same on every device, and any slice of a
tensor can be rounded alone. Measured in tests/training/test_stochastic_rounding.py.

Compensation (Kahan's idea) keeps the rest that rounding to nearest left, 2 bytes a weight. A bf16 rest would be rounded
itself, and at 4e-7 stops to grow on weights near 1; here it is the difference of the bit patterns, an exact int16, so
that weight and rest together are the float32 weight to the bit.
"""

from __future__ import annotations

import torch
from torch import Tensor

CHUNK_ELEMENTS = {"cpu": 1 << 17, "cuda": 1 << 25}
_MULTIPLIER_1, _MULTIPLIER_2 = 0x7FEB352D, 0x846CA68B - (1 << 32)  # lowbias32, github.com/skeeto/hash-prospector


class RoundingNoise:
    """The random bits of one step. `key`: 64 bits. Made in chunks, so that many small tensors share one."""

    def __init__(self, *, key: int, device: torch.device) -> None:
        self.key, self.device = key, device
        self._size = CHUNK_ELEMENTS.get(device.type, CHUNK_ELEMENTS["cuda"])
        self._number, self._bits = -1, torch.empty(0)

    def piece(self, position: int, *, most: int) -> Tensor:
        """Bits of the elements from `position` on, int32 in [0, 65536): at least one, at most `most`."""
        number, offset = divmod(position, self._size)
        if number != self._number:
            self._number = number
            self._bits = random_16_bits(self._size, start=number * self._size, key=self.key, device=self.device)
        return self._bits[offset : offset + most]


def round_into(target: Tensor, values: Tensor, noise: RoundingNoise, *, position: int) -> None:
    """Write `values` (float32) into `target` (bfloat16, same shape, both contiguous), rounding up or down at random.

    P(up) is the distance from the lower neighbour in units of the gap, so the expected result is `values`; values
    that bf16 can represent stay what they are. `values` is overwritten. `position`: of the first element in `noise`.
    """
    flat_target, flat_values = target.view(-1), values.view(-1)
    start, count = 0, flat_values.numel()
    while start < count:
        random = noise.piece(position + start, most=count - start)
        chunk = flat_values[start : start + len(random)]
        bits = chunk.view(torch.int32)
        bits += random
        bits &= -0x10000
        flat_target[start : start + len(random)] = chunk
        start += len(random)


def with_rest(target: Tensor, rest: Tensor) -> Tensor:
    """The float32 weights that `split_into` took apart. target: bfloat16; rest: int16; same shape, contiguous."""
    bits = target.to(torch.float32).view(torch.int32)
    bits += rest
    return bits.view(torch.float32)


def split_into(target: Tensor, rest: Tensor, values: Tensor) -> None:
    """Write float32 `values` rounded to nearest into `target` (bfloat16), what is left over into `rest` (int16).

    `values` is overwritten. Source: W. Kahan, "Further remarks on reducing truncation errors", 1965, for the idea.
    """
    bits = values.view(torch.int32)
    low = bits & 0xFFFF
    low -= (low >= 0x8000).to(torch.int32) << 16
    rest.copy_(low)
    bits -= low
    target.copy_(values)


def random_16_bits(count: int, *, start: int, key: int, device: torch.device) -> Tensor:
    """Uniform integers in [0, 65536) for positions start … start + count, int32 [count]. `start`: even."""
    words = torch.arange(-(-count // 2), dtype=torch.int32, device=device)
    scratch = torch.empty_like(words)
    words += _signed(key + start // 2)
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
