"""Steps that would ruin the weights: a loss or gradient that is not finite, or one far above the others."""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping
from typing import Any

from sdxl_core.errors import TrainingError

WINDOW_STEPS = 1000
MEMORY = 0.99  # of the running average
WARM_UP_STEPS = 20  # until the average means something
NAMED = 5
logger = logging.getLogger(__name__)


class Guard:
    """Judges every step, the same on every process. `watched`: gradient norm, or the loss where weights move during

    the backward pass.
    """

    def __init__(self, *, max_bad_steps: int, spike_factor: float, metadata_name: str) -> None:
        self.bad_steps: list[int] = []
        self._max, self._factor, self._metadata = max_bad_steps, spike_factor, metadata_name
        self._average, self._count = 0.0, 0

    def is_known_bad(self, step: int) -> bool:
        """Was left out before, and is again after going back behind it."""
        return step in self.bad_steps

    def fault(self, losses: Mapping[str, float], *, watched: float, what: str, may_spike: bool = True) -> str:
        """What is wrong with a step, "" where nothing is. `losses`: by sample; `what`: names `watched`."""
        if not math.isfinite(watched) or not all(map(math.isfinite, losses.values())):
            return f"the loss or its gradient is not finite ({what} {watched:.4g})"
        if may_spike and self._factor and self._count >= WARM_UP_STEPS and watched > self._factor * self._average:
            return f"a spike: {what} {watched:.4g}, {watched / self._average:.3g} times its average"
        return ""

    def passed(self, watched: float) -> None:
        """A step was applied."""
        self._count += 1
        memory = min(MEMORY, 1 - 1 / self._count)
        self._average = memory * self._average + (1 - memory) * watched

    def leave_out(self, step: int, fault: str, losses: Mapping[str, float], *, undone: str) -> None:
        """Note that `step` is bad and name its samples. Raises: TrainingError: there were too many."""
        self.bad_steps = [other for other in self.bad_steps if other > step - WINDOW_STEPS and other != step] + [step]
        guilty = {key: loss for key, loss in losses.items() if not math.isfinite(loss)} or losses
        listed = ", ".join(f"{key!r} (loss {loss:.4g})" for key, loss in list(guilty.items())[:NAMED])
        said = f"step {step + 1}: {fault}, seen on {listed}. {undone}"
        if len(self.bad_steps) > self._max:
            so_far = f" It is number {len(self.bad_steps)} within {WINDOW_STEPS} steps." if self._max else ""
            raise TrainingError(
                f"{said}{so_far} If the latents of these pictures hold NaN, take them out of {self._metadata}; "
                f"otherwise lower learning_rate. Then train into another out folder."
            )
        logger.warning("%s The step is left out; %d of at most %d.", said, len(self.bad_steps), self._max)

    def state(self) -> dict[str, Any]:
        """JSON values, for `load`."""
        return {"bad_steps": list(self.bad_steps), "average": self._average, "count": self._count}

    def load(self, state: Mapping[str, Any]) -> None:
        """Continue from what `state` gave."""
        self.bad_steps = list(state["bad_steps"])
        self._average, self._count = state["average"], state["count"]
