"""The average loss of the last epoch, as the field's tools show it (`avr_loss`)."""

from __future__ import annotations

import torch
from torch import Tensor


class LossAverage:
    """Mean over the newest `num_steps` step losses (one epoch's); over all of them while there are fewer."""

    def __init__(self, num_steps: int) -> None:
        self._window: list[float] = []
        self._num_steps = num_steps
        self.total = 0.0

    def add(self, step: int, loss: float) -> None:
        """The loss of `step` takes the place of the loss one epoch before it."""
        place = step % self._num_steps
        if place < len(self._window):
            self.total -= self._window[place]
            self._window[place] = loss
        else:
            self._window.append(loss)
        self.total += loss

    @property
    def value(self) -> float:
        """The average; 0 before the first step."""
        return self.total / len(self._window) if self._window else 0.0

    def window(self) -> Tensor:
        """The losses in the window, float64 [<= num_steps]."""
        return torch.tensor(self._window, dtype=torch.float64)

    def load(self, window: Tensor, total: float) -> None:
        """Continue from what `window` and `total` were."""
        self._window, self.total = window.tolist(), total
