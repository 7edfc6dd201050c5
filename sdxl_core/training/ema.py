"""An average of the weights over time: float32 in main memory, updated by a thread while training goes on."""

from __future__ import annotations

from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import torch
from torch import Tensor


class Ema:
    """average = d * average + (1 - d) * weights, every `every` steps with d = decay ** every.

    Weights are copied to main memory beside the computation; `before_update` holds the next update back until they are.
    """

    def __init__(self, weights: Mapping[str, Tensor], *, decay: float, every: int, device: torch.device) -> None:
        """`weights`: what this process holds of the trained parameters, on `device`; the average starts there.

        Of several processes one may hold nothing.
        """
        self._weights = weights
        self._decay, self._every = decay**every, every
        self._stream: Any = torch.cuda.Stream(device) if device.type == "cuda" else None  # type: ignore[no-untyped-call]
        self._host = {name: torch.empty(value.shape, dtype=value.dtype, pin_memory=self._stream is not None)
                      for name, value in weights.items()}  # fmt: skip
        self._averages = {name: value.detach().to("cpu", torch.float32, copy=True) for name, value in weights.items()}
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="ema")
        self._running: Future[None] | None = None

    def after_step(self, num_steps: int) -> None:
        """Take note of the weights after `num_steps` steps of the run."""
        if num_steps % self._every:
            return
        self._wait()
        if self._stream is None:
            self._copy()
        else:
            self._stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(self._stream):
                self._copy()
        self._running = self._pool.submit(self._average)

    def before_update(self) -> None:
        """The weights are about to change."""
        if self._stream is not None:
            torch.cuda.current_stream().wait_stream(self._stream)

    def tensors(self, *, copy: bool = True) -> dict[str, Tensor]:
        """The averages by parameter, as of the last `after_step`: float32."""
        self._wait()
        return {name: value.clone() for name, value in self._averages.items()} if copy else dict(self._averages)

    def load(self, averages: Mapping[str, Tensor]) -> None:
        """Continue from what `tensors` gave."""
        self._wait()
        for name, value in averages.items():
            self._averages[name].copy_(value.view_as(self._averages[name]))

    @torch.no_grad()
    def _copy(self) -> None:
        for name, value in self._weights.items():
            self._host[name].copy_(value, non_blocking=True)

    @torch.no_grad()
    def _average(self) -> None:
        if self._stream is not None:
            self._stream.synchronize()
        for name, average in self._averages.items():
            average.lerp_(self._host[name].to(torch.float32), 1 - self._decay)

    def _wait(self) -> None:
        if self._running is not None:
            self._running.result()
            self._running = None
