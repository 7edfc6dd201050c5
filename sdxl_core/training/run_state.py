"""All that moves during a run, as one thing that is copied to main memory, saved, and put back."""

from __future__ import annotations

import logging
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import Tensor

from sdxl_core.config import TrainConfig
from sdxl_core.errors import CheckpointError
from sdxl_core.training.ema import Ema
from sdxl_core.training.guard import Guard
from sdxl_core.training.loss_average import LossAverage
from sdxl_core.training.parallel import Piece, local
from sdxl_core.training.reshard import gather_piece, optimizer_states
from sdxl_core.training.state import Generation, Snapshot
from sdxl_core.training.training_set import TrainingSet
from sdxl_core.training.updates import Updater

logger = logging.getLogger(__name__)


class RunState:
    """Weights, optimizer states, averages and the guard's memory: what this process holds of them."""

    def __init__(
        self,
        updater: Updater,
        *,
        config: TrainConfig,
        settings: dict[str, Any],
        training_set: TrainingSet,
        average: LossAverage,
        guard: Guard,
        writes: bool,
    ) -> None:
        """`settings`: `run_settings`.   writes: does this process save anything?"""
        self._updater = updater
        self._run = {
            "settings": settings,
            "config": config.model_dump(mode="json"),
            "dataset_digest": training_set.digest,
            "metadata_sha256": training_set.metadata_sha256,
            "resolution": "{}x{}".format(*training_set.resolution_px),
        }
        self.average, self.guard = average, guard
        self.weights = {name: local(parameter.detach()) for _, name, parameter in updater.walk()}
        self.ema: Ema | None = None
        if config.ema_decay is not None and writes:
            held = {name: value for name, value in self.weights.items() if value.numel()}
            device = next(iter(self.weights.values())).device
            self.ema = Ema(held, decay=config.ema_decay, every=config.ema_every_steps, device=device)
        self._is_divided = any(piece.count < piece.total for piece in updater.pieces.values())

    def snapshot(self, step: int, *, copy: bool = True) -> Snapshot:
        """A copy in main memory of the run after `step` steps; `copy`: false where nothing moves until it is saved."""
        optimizer = self._updater.optimizer
        tensors = {"weights": self.weights, "optimizer": optimizer.state_tensors()}
        if copy:
            tensors = {name: _copied(held) for name, held in tensors.items()}
        if self.ema is not None:
            tensors["ema"] = self.ema.tensors(copy=copy)
        return Snapshot(
            step=step,
            run=self._run,
            scalars={"losses": self.average.state(), "guard": self.guard.state()},
            tensors=tensors,
            numbers=optimizer.state_scalars(),
            pieces=self._updater.pieces if self._is_divided else {},
        )

    def restore(self, generation: Generation) -> int:
        """Continue from a saved state, written by however many processes. Returns its step.

        Raises: CheckpointError: of another model, or with states that cannot be divided otherwise.
        """
        pieces = self._updater.pieces
        self._check_names({name: _total(part, name) for part in generation.parts for name in part.tensors["weights"]})
        for name, weights in self.weights.items():
            weights.copy_(gather_piece(generation, "weights", name, pieces[name]).view_as(weights))
        shapes = {name: weights.shape for name, weights in self.weights.items()}
        tensors, numbers, measured = optimizer_states(generation, pieces, shapes)
        self._updater.optimizer.load_state(tensors, numbers)
        if measured.total:
            logger.info(
                "the 8-bit optimizer states were saved by another number of processes and are quantised anew: "
                "relative error %.2g", measured.relative_error,
            )  # fmt: skip
        if self.ema is not None:
            held = [name for name in self.weights if pieces[name].count]
            self.ema.load({name: gather_piece(generation, "ema", name, pieces[name]) for name in held})
        scalars = generation.scalars
        if "losses" in scalars:
            self.average.load(scalars["losses"], step=generation.step)
        else:  # a state of an older version
            window = generation.tensors["losses"]["window"].tolist()
            self.average.take_over(window, scalars["loss_total"], step=generation.step)
        self.guard.load(scalars["guard"])
        return generation.step

    def go_back(self, snapshot: Snapshot) -> int:
        """Continue from a copy of this process, knowing of the bad steps that were met since. Returns its step."""
        bad_steps = self.guard.bad_steps
        copy = replace(snapshot, tensors={name: _copied(tensors) for name, tensors in snapshot.tensors.items()})
        step = self.restore(Generation(path=Path(), step=copy.step, run=copy.run, parts=(copy,)))
        self.guard.bad_steps = bad_steps
        return step

    def _check_names(self, totals: dict[str, int]) -> None:
        if totals != {name: piece.total for name, piece in self._updater.pieces.items()}:
            raise CheckpointError(
                "the saved weights are of another model than base_model. Train into another out folder."
            )


def _total(part: Snapshot, name: str) -> int:
    whole = part.tensors["weights"][name].numel()
    return part.pieces.get(name, Piece(offset=0, count=whole, total=whole)).total


def _copied(tensors: Any) -> dict[str, Tensor]:
    return {name: value.detach().to("cpu", copy=True) for name, value in tensors.items()}
