"""The average loss of the last epoch, as the field's tools show it (`avr_loss`)."""

from __future__ import annotations

import logging
import math
import os
import struct
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from sdxl_core.files import disk_errors

LOSS = struct.Struct("<d")
TOLERANCE = 1e-6  # between a sum that was kept over millions of steps and one made at once
logger = logging.getLogger(__name__)


class LossAverage:
    """Mean over the newest `num_steps` step losses (one epoch's); over all of them while there are fewer.

    Only their sum is held. The loss that leaves it is read back from `log`, which belongs to the run, not to a state:
    float64, little-endian, the loss of step n (from 0) at byte 8 n.
    """

    def __init__(self, log: Path | None, num_steps: int) -> None:
        """`log`: None on all processes but the first: they show no average, and theirs stays 0."""
        self._log, self._num_steps = log, num_steps
        self._total, self._count = 0.0, 0

    def add(self, step: int, loss: float) -> None:
        """The loss of `step` takes the place of the loss one epoch before it. Raises: DiskFullError."""
        if self._log is None:
            return
        with disk_errors(self._log), open(os.open(self._log, os.O_RDWR | os.O_CREAT, 0o666), "r+b") as file:
            if self._count == self._num_steps:
                file.seek(LOSS.size * (step - self._num_steps))
                self._total -= LOSS.unpack(file.read(LOSS.size))[0]
            else:
                self._count += 1
            self._total += loss
            file.seek(LOSS.size * step)
            file.write(LOSS.pack(loss))

    @property
    def value(self) -> float:
        """The average; 0 before the first step."""
        return self._total / self._count if self._count else 0.0

    def state(self) -> dict[str, Any]:
        """JSON values, for `load`."""
        return {"total": self._total, "count": self._count}

    def load(self, state: Mapping[str, Any], *, step: int) -> None:
        """Continue after `step` steps from what `state` gave then. Where the log is not of that run it begins anew."""
        if self._log is None:
            return
        self._total, self._count = state["total"], state["count"]
        if self._count and not math.isclose(self._logged(self._log, step), self._total, rel_tol=TOLERANCE):
            logger.warning("%s: is missing, or not of this run. avr_loss begins anew at step %d.", self._log, step)
            self._total, self._count = 0.0, 0

    def take_over(self, losses: Sequence[float], total: float, *, step: int) -> None:
        """As `load`, from states of older versions, which held the losses: that of step n at n modulo an epoch."""
        if self._log is None:
            return
        with disk_errors(self._log), open(self._log, "wb") as file:
            for number in range(step - len(losses), step):
                file.seek(LOSS.size * number)
                file.write(LOSS.pack(losses[number % self._num_steps]))
        self._total, self._count = total, len(losses)

    def _logged(self, log: Path, step: int) -> float:
        """Sum of the losses that the average holds after `step` steps; NaN where they are not there."""
        try:
            start = LOSS.size * (step - self._count)
            return float(np.memmap(log, "<f8", "r", offset=start, shape=(self._count,)).sum())
        except (OSError, ValueError):
            return math.nan
