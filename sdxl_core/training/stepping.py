"""One optimizer step on one process: forward, backward, agreement with the others, update, or leaving it out."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from dataclasses import dataclass

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from sdxl_core.config import TrainConfig
from sdxl_core.models import TokenIds
from sdxl_core.training.batches import BatchMaker, MicroBatch
from sdxl_core.training.ema import Ema
from sdxl_core.training.guard import Guard
from sdxl_core.training.objectives import Objective
from sdxl_core.training.parallel import gradient_norm, without_exchange
from sdxl_core.training.processes import StopSignal
from sdxl_core.training.text_outputs import TextOutputs
from sdxl_core.training.updates import Updater
from sdxl_core.training.watch import Stopwatch


@dataclass(frozen=True, slots=True, kw_only=True)
class Gathered:
    """What all processes tell each other in a step. losses: by sample key.   stop, save: one of them asks for it."""

    losses: dict[str, float]
    stop: bool
    save: bool

    @property
    def loss(self) -> float:
        """Mean over all samples, everywhere."""
        return sum(self.losses.values()) / len(self.losses)


@dataclass(frozen=True, slots=True, kw_only=True)
class StepResult:
    """What a step did, the same on every process. `fault`: why it was left out, "" where it was applied.

    `moved`: weights have moved in a step that is left out, so the run has to go back.
    """

    gathered: Gathered
    grad_norm: float = 0.0
    update_share: float | None = None
    fault: str = ""
    moved: bool = False


class Stepper:
    """Does the steps of a run; what it is made of belongs to the run."""

    def __init__(
        self,
        model: nn.Module,
        updater: Updater,
        *,
        config: TrainConfig,
        accelerator: Accelerator,
        batches: BatchMaker,
        guard: Guard,
        ema: Ema | None,
        scaling_factor: float,
        save_is_due: Callable[[], bool],
        texts: TextOutputs | None = None,
    ) -> None:
        """`scaling_factor`: of the latents.   save_is_due: does this process want a state saved now?

        texts: the captions' encodings, where they are known.
        """
        self.texts = texts
        self.model, self.updater, self.config, self.accelerator = model, updater, config, accelerator
        self.batches, self.guard, self.ema, self.save_is_due = batches, guard, ema, save_is_due
        self.scaling_factor = scaling_factor
        self.objective = Objective(config, device=accelerator.device)
        self.parameters = [parameter for _, _, parameter in updater.walk()]
        self.mixed = config.mixed_precision == "bf16" and config.weights_dtype == "float32"
        self.time = Stopwatch(accelerator.device)
        self.back_to: int | None = None  # the step a fused run can go back to

    def step(self, step: int, batches: list[MicroBatch], stop: StopSignal) -> StepResult:
        """One optimizer step over its micro-batches, applied or left out.

        Raises: TrainingError: it is one bad step too many.
        """
        return (
            self._fused_step(step, batches[0], stop) if self.config.fused_backward else self._step(step, batches, stop)
        )

    def _step(self, step: int, batches: list[MicroBatch], stop: StopSignal) -> StepResult:
        num_samples = sum(len(batch) for batch in self.batches.global_batches(step))
        rows = []
        for number, batch in enumerate(batches):
            last = number == len(batches) - 1
            with contextlib.nullcontext() if last else without_exchange(self.model):
                with self.time("forward"):
                    losses = self.losses(batch)
                with self.time("backward"):
                    counted = losses[: batch.num_counted] if batch.num_counted else losses * 0.0
                    share = self.accelerator.num_processes / num_samples  # gradients are averaged over processes
                    torch.autograd.backward(counted.sum() * share)
            rows.append(self._row(batch, losses))
        with self.time("sync"):
            gathered = self._gather(step, rows, stop)
            norm = gradient_norm(self.parameters)
            grad_norm = float(norm)
        fault = self.guard.fault(gathered.losses, watched=grad_norm, what="gradient norm")
        if fault:
            self.updater.discard()
            self.guard.leave_out(step, fault, gathered.losses, undone="Nothing of this step was applied.")
            return StepResult(gathered=gathered, fault=fault)
        with self.time("optimizer"):
            if self.ema is not None:
                self.ema.before_update()
            update_share = self.updater.apply(step, norm)
        self.guard.passed(grad_norm)
        return StepResult(gathered=gathered, grad_norm=grad_norm, update_share=update_share)

    def _fused_step(self, step: int, batch: MicroBatch, stop: StopSignal) -> StepResult:
        """The loss is looked at before the backward pass, each gradient before it moves its weights."""
        with self.time("forward"):
            losses = self.losses(batch)
        with self.time("sync"):
            gathered = self._gather(step, [self._row(batch, losses)], stop)
        fault = self.guard.fault(gathered.losses, watched=gathered.loss, what="loss")
        if fault:
            self.guard.leave_out(step, fault, gathered.losses, undone="Nothing of this step was applied.")
            return StepResult(gathered=gathered, fault=fault)
        if self.ema is not None:
            self.ema.before_update()
        self.updater.begin(step)
        with self.time("backward"):
            torch.autograd.backward(losses.sum() / len(losses))
        with self.time("optimizer"):
            norm, update_share = self.updater.end()
            grad_norm = float(norm)
        fault = self.guard.fault({}, watched=grad_norm, what="gradient norm", may_spike=False)
        if fault:
            back = (
                f"Weights go back to step {self.back_to}." if self.back_to is not None else "Some weights have moved."
            )
            self.guard.leave_out(step, fault, gathered.losses, undone=back)
            return StepResult(gathered=gathered, fault=fault, moved=True)
        self.guard.passed(gathered.loss)
        return StepResult(gathered=gathered, grad_norm=grad_norm, update_share=update_share)

    def losses(self, batch: MicroBatch) -> Tensor:
        """Loss of each sample of a micro-batch, float32 [B], with gradient."""
        device = self.accelerator.device
        latents = batch.latents.to(device) * self.scaling_factor
        draw = batch.draw.to(device)
        encoded = None
        if self.texts is not None:
            tokens = TokenIds(clip_l=batch.clip_l, clip_g=batch.clip_g, weights=batch.token_weights)
            embeds, pooled = self.texts.of(tokens)
            encoded = (embeds.to(device), pooled.to(device))
        with self.accelerator.autocast() if self.mixed else contextlib.nullcontext():
            prediction = self.model(
                self.objective.noisy(latents, draw),
                draw.timesteps,
                batch.clip_l.to(device),
                batch.clip_g.to(device),
                batch.time_ids.to(device),
                None if batch.token_weights is None else batch.token_weights.to(device),
                encoded,
            )
        mask = None if batch.mask is None else batch.mask.to(device)
        return self.objective.losses(prediction, latents, draw, mask)

    def _row(self, batch: MicroBatch, losses: Tensor) -> Tensor:
        row = torch.zeros(self.config.train_batch_size, device=losses.device)
        row[: batch.num_counted] = losses.detach()[: batch.num_counted]
        return row

    def _gather(self, step: int, rows: list[Tensor], stop: StopSignal) -> Gathered:
        """`rows`: this process's losses by micro-batch. Waits for all processes, and for the card."""
        flags = torch.tensor([float(stop.received), float(self.save_is_due())], device=rows[0].device)
        table = self.accelerator.gather(torch.cat([*rows, flags])).view(self.accelerator.num_processes, -1).cpu()
        losses = table[:, :-2].double().view(len(table), len(rows), -1)
        named = {
            key: float(losses[process, number, i])
            for process, parts in enumerate(self.batches.keys_of(step))
            for number, part in enumerate(parts)
            for i, key in enumerate(part)
        }
        return Gathered(losses=named, stop=bool(table[:, -2].any()), save=bool(table[:, -1].any()))
