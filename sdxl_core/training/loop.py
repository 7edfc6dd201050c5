"""The run itself, one process's view: load, then step after step, then the checkpoint.

Everything random is keyed by the step (order, captions, noise, rounding), so continuing is starting at another step.
"""

from __future__ import annotations

import contextlib
import logging
import math
import time
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import orjson
import torch
from accelerate import Accelerator
from accelerate.utils import DistributedDataParallelKwargs
from torch import Tensor

from sdxl_core.config import TrainConfig
from sdxl_core.errors import ConfigError, TrainingError
from sdxl_core.files import write_atomic
from sdxl_core.models import component_config
from sdxl_core.refs import CheckpointRef
from sdxl_core.training.batches import BatchMaker, MicroBatch
from sdxl_core.training.denoiser import Denoiser
from sdxl_core.training.loss_average import LossAverage
from sdxl_core.training.objectives import Objective
from sdxl_core.training.optimizer import SlotOptimizer, clip_factor, gradient_norm
from sdxl_core.training.order import EpochPlan
from sdxl_core.training.parts import TrainedModels, load_trained_models, save_checkpoint
from sdxl_core.training.previews import preview_path, preview_steps, write_previews
from sdxl_core.training.processes import ProgressFile, StopSignal
from sdxl_core.training.result import run_settings, write_result
from sdxl_core.training.schedules import lr_schedule
from sdxl_core.training.state import Snapshot, load_newest, save_snapshot
from sdxl_core.training.training_set import TrainingSet, read_training_set

LOG_EVERY_S = 10.0
logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class StepResult:
    """What a step did, the same on every process. `stop`: a process was asked to leave."""

    loss: float
    grad_norm: float
    update_share: float | None
    num_samples: int
    stop: bool


def train(config: TrainConfig, *, stop: StopSignal) -> bool:
    """Train from the newest state to the end. Returns False where `stop` ended it early (its state is saved).

    Raises: ConfigError, DataError, CheckpointError, DiskFullError.   TrainingError: the loss is not finite.
    """
    accelerator = make_accelerator(config)
    training_set = read_training_set(config)
    run = Run(config, accelerator, training_set, training_set.plan(config))
    finished = run.to_the_end(stop)
    if finished:
        run.finish()
    accelerator.end_training()
    return finished


def make_accelerator(config: TrainConfig) -> Accelerator:
    """Device, processes, autocast and logging, by accelerate.

    Raises: ConfigError: started with another number of processes than `num_processes`.
    """
    accelerator = Accelerator(
        mixed_precision=config.mixed_precision,
        cpu=bool(config.use_cpu),
        log_with="tensorboard",
        project_dir=str(config.out / "tensorboard"),
        kwargs_handlers=[DistributedDataParallelKwargs(broadcast_buffers=False, gradient_as_bucket_view=True)],
    )
    if accelerator.num_processes != config.num_processes:
        raise ConfigError(
            f"num_processes = {config.num_processes}, but {accelerator.num_processes} training processes were started. "
            f"`accelerate launch --cpu --num_processes 2` starts one only; `sdxl-flows train` writes a configuration "
            f"that starts them all."
        )
    if accelerator.device.type == "cuda":
        torch.use_deterministic_algorithms(True, warn_only=True)  # so that a resumed run repeats on the same card
        torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
        torch.backends.cudnn.benchmark = False
    return accelerator


class Run:
    """A run on one process, from its newest state on."""

    def __init__(
        self, config: TrainConfig, accelerator: Accelerator, training_set: TrainingSet, plan: EpochPlan
    ) -> None:
        self.config, self.accelerator, self.plan, self.training_set = config, accelerator, plan, training_set
        self.state = config.out / "state"
        self.total = config.max_train_epochs * plan.num_steps if config.max_train_epochs else config.max_train_steps
        self.settings = run_settings(config, training_set)
        snapshot = load_newest(self.state, settings=self.settings)
        self.models: TrainedModels = load_trained_models(config, device=accelerator.device)
        self.optimizer = SlotOptimizer(
            self.models.groups,
            kind=config.optimizer,
            betas=config.adam_betas,
            eps=config.adam_epsilon,
            weight_decay=config.weight_decay,
            seed=config.seed,
            arguments=config.optimizer_args,
            rounding=config.weights_rounding,
        )
        self.average = LossAverage(plan.num_steps)
        self.start = self._restore(snapshot) if snapshot else 0
        self.denoiser: Denoiser = self.models.denoiser
        self.model = accelerator.prepare_model(self.denoiser)
        self.lr_factor = lr_schedule(config, total_steps=self.total)
        self.objective = Objective(config, device=accelerator.device)
        self.scaling_factor = float(component_config(self.models.preset, "vae")["scaling_factor"])
        self.batches = BatchMaker(training_set, plan, config, rank=accelerator.process_index)
        self.progress = ProgressFile(self.state)
        self.last_line_s = float("-inf")

    @property
    def parameters(self) -> list[torch.nn.Parameter]:
        return [parameter for group in self.models.groups for parameter in group.parameters]

    def to_the_end(self, stop: StopSignal) -> bool:
        """Every step that is left. Returns False where `stop` ended it."""
        config = self.config
        if self.start > self.total:
            raise ConfigError(
                f"{self.state}: is at step {self.start} already; max_train_steps = {self.total} lies behind that. "
                f"Ask for at least {self.start} steps, or choose another out folder."
            )
        logger.info(
            "%d pictures in %d buckets, %d optimizer steps an epoch; steps %d to %d on %d x %s",
            self.plan.num_samples, len(self.plan.buckets), self.plan.num_steps, self.start, self.total,
            self.accelerator.num_processes, self.accelerator.device,
        )  # fmt: skip
        self._start_log()
        preview_at = set(preview_steps(config, self.total)) - {self.total}
        began_s = time.monotonic()
        for step, batches in enumerate(self.batches.steps(self.start, self.total), self.start):
            result = self.step(step, batches, stop)
            done = step + 1
            self._report(step, result, seconds=time.monotonic() - began_s)
            if done in preview_at:
                self._on_main(lambda step=done: write_previews(self.denoiser, config, step=step))
            if result.stop or done == self.total or (config.save_every_steps and done % config.save_every_steps == 0):
                self._save(done)
            if result.stop and done < self.total:
                logger.info("asked to stop: state saved at step %d of %d", done, self.total)
                return False
            began_s = time.monotonic()
        return True

    def step(self, step: int, batches: list[MicroBatch], stop: StopSignal) -> StepResult:
        """One optimizer step over its micro-batches. The loss of a step is the mean over all its samples, everywhere.

        Raises: TrainingError: loss or gradients are not finite; nothing was applied.
        """
        num_samples = sum(len(batch) for batch in self.batches.global_batches(step))
        rows = []
        for number, batch in enumerate(batches):
            last = number == len(batches) - 1
            with contextlib.nullcontext() if last else self.accelerator.no_sync(self.model):
                losses = self.losses(batch)[: batch.num_counted] if batch.num_counted else self.losses(batch) * 0.0
                share = self.accelerator.num_processes / num_samples  # data parallelism averages over processes
                self.accelerator.backward(losses.sum() * share)
            row = torch.zeros(self.config.train_batch_size, device=self.accelerator.device)
            row[: batch.num_counted] = losses.detach()[: batch.num_counted]
            rows.append(row)
        flag = torch.tensor([float(stop.received)], device=self.accelerator.device)
        gathered = self.accelerator.gather(torch.cat([*rows, flag])).view(self.accelerator.num_processes, -1).cpu()
        loss = float(gathered[:, :-1].double().sum()) / num_samples
        norm = gradient_norm(self.parameters)
        self._check_finite(step, gathered[:, :-1].view(len(gathered), len(batches), -1), float(norm))
        update_share = self.optimizer.step(
            step=step,
            lr_factor=self.lr_factor(step),
            grad_factor=clip_factor(norm, max_norm=self.config.max_grad_norm),
        )
        return StepResult(
            loss=loss,
            grad_norm=float(norm),
            update_share=update_share,
            num_samples=num_samples,
            stop=bool(gathered[:, -1].any()),
        )

    def losses(self, batch: MicroBatch) -> Tensor:
        """Loss of each sample of a micro-batch, float32 [B], with gradient."""
        device = self.accelerator.device
        latents = batch.latents.to(device) * self.scaling_factor
        draw = batch.draw.to(device)
        prediction = self.model(
            self.objective.noisy(latents, draw),
            draw.timesteps,
            batch.clip_l.to(device),
            batch.clip_g.to(device),
            batch.time_ids.to(device),
        )
        mask = None if batch.mask is None else batch.mask.to(device)
        return self.objective.losses(prediction, latents, draw, mask)

    def _check_finite(self, step: int, losses: Tensor, norm: float) -> None:
        """losses: [process, micro-batch, sample]."""
        if math.isfinite(norm) and bool(losses.isfinite().all()):
            return
        keys = self.batches.keys_of(step)
        named = {
            key: float(losses[process, number, i])
            for process, parts in enumerate(keys)
            for number, part in enumerate(parts)
            for i, key in enumerate(part)
        }
        guilty = {key: loss for key, loss in named.items() if not math.isfinite(loss)} or named
        listed = ", ".join(f"{key!r} (loss {loss:.4g})" for key, loss in list(guilty.items())[:5])
        raise TrainingError(
            f"step {step + 1}: the loss or its gradient is not finite (gradient norm {norm:.4g}), seen on {listed}. "
            f"Nothing of this step was applied. If the latents of these pictures hold NaN, take them out of "
            f"{self.config.metadata.name}; otherwise lower learning_rate. Then train into another out folder."
        )

    def _report(self, step: int, result: StepResult, *, seconds: float) -> None:
        self.average.add(step, result.loss)
        images_per_s = result.num_samples / seconds
        factor = self.lr_factor(step)
        scalars = {
            "loss": result.loss,
            "avr_loss": self.average.value,
            "grad_norm": result.grad_norm,
            "images_per_s": images_per_s,
            **{f"lr/{group.name}": group.learning_rate * factor for group in self.models.groups},
        }
        if result.update_share is not None:
            scalars["update_share"] = result.update_share
        self.accelerator.log(scalars, step=step + 1)
        if not self.accelerator.is_main_process:
            return
        self.progress.write(
            step=step + 1, total=self.total, loss=result.loss, avr_loss=self.average.value, images_per_s=images_per_s
        )
        if time.monotonic() - self.last_line_s >= LOG_EVERY_S or step + 1 == self.total:
            self.last_line_s = time.monotonic()
            logger.info(
                "step %d/%d loss %.4f avr_loss %.4f grad_norm %.3g %.2f images/s",
                step + 1, self.total, result.loss, self.average.value, result.grad_norm, images_per_s,
            )  # fmt: skip

    def _start_log(self) -> None:
        """Open the TensorBoard run: the one this run had before, cut after the step we continue from."""
        name = f"{self.config.log_prefix}{datetime.now(UTC):%Y%m%d%H%M%S}"
        record = self.state / "run.json"
        if record.exists():
            known: dict[str, Any] = orjson.loads(record.read_bytes())
            if known["settings"] == self.settings:
                name = known["tensorboard"]
        if self.accelerator.is_main_process:
            write_atomic(record, orjson.dumps({"tensorboard": name, "settings": self.settings}))
        self.accelerator.init_trackers(name, init_kwargs={"tensorboard": {"purge_step": self.start + 1}})

    def _save(self, step: int) -> None:
        def save() -> None:
            scalars = {"optimizer": self.optimizer.state_scalars(), "loss_total": self.average.total}
            tensors = {
                "weights": self.models.trained_tensors(),
                "optimizer": self.optimizer.state_tensors(),
                "losses": {"window": self.average.window()},
            }
            save_snapshot(self.state, Snapshot(step=step, settings=self.settings, scalars=scalars, tensors=tensors))

        self._on_main(save)

    def _restore(self, snapshot: Snapshot) -> int:
        self.models.load_trained_tensors(dict(snapshot.tensors["weights"]))
        self.optimizer.load_state(dict(snapshot.tensors["optimizer"]), snapshot.scalars["optimizer"])
        self.average.load(snapshot.tensors["losses"]["window"], snapshot.scalars["loss_total"])
        return snapshot.step

    def _on_main(self, work: Any) -> None:
        if self.accelerator.is_main_process:
            work()
        self.accelerator.wait_for_everyone()

    def finish(self) -> None:
        """Previews, the single-file checkpoint, and last the record that says all is done."""
        self._on_main(self._finish)

    def _finish(self) -> None:
        config = self.config
        steps = preview_steps(config, self.total)
        if steps:
            write_previews(self.denoiser, config, step=self.total)
        file = save_checkpoint(self.models, config, digest=self.training_set.digest, num_steps=self.total)
        paths = [preview_path(config, step, i) for step in steps for i in range(len(config.sample_prompts))]
        write_result(
            config,
            self.settings,
            CheckpointRef(
                file=file,
                state=self.state,
                tensorboard=self._tensorboard(),
                samples=tuple(path for path in paths if path.exists()),
                num_steps=self.total,
                num_images=self.plan.num_samples,
                final_avr_loss=self.average.value,
                parents=(self.training_set.digest, self.settings["base_model"]),
            ),
        )

    def _tensorboard(self) -> Path:
        name: str = orjson.loads((self.state / "run.json").read_bytes())["tensorboard"]
        return self.config.out / "tensorboard" / name
