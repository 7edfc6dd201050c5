"""The run itself, one process's view: load, then step after step, then the checkpoint.

Everything random is keyed by the step (order, captions, noise, rounding), so continuing is starting at another step.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import InitProcessGroupKwargs

from sdxl_core.config import TrainConfig
from sdxl_core.errors import ConfigError
from sdxl_core.files import digest_of
from sdxl_core.models import component_config
from sdxl_core.models.load import preset_of
from sdxl_core.refs import CheckpointRef
from sdxl_core.training.batches import BatchMaker
from sdxl_core.training.denoiser import Denoiser
from sdxl_core.training.guard import Guard
from sdxl_core.training.heldout import HeldOut
from sdxl_core.training.loss_average import LossAverage
from sdxl_core.training.memory_plan import check_card
from sdxl_core.training.optimizer import SlotOptimizer
from sdxl_core.training.order import EpochPlan
from sdxl_core.training.parallel import replicate, shard
from sdxl_core.training.parts import load_trained_models, model_path, save_checkpoint
from sdxl_core.training.previews import preview_paths, preview_steps, write_previews
from sdxl_core.training.processes import StopSignal
from sdxl_core.training.result import former_settings, run_settings, write_result
from sdxl_core.training.run_state import RunState
from sdxl_core.training.saving import Saver, SaveTimes, remove_old_models
from sdxl_core.training.schedules import lr_schedule, total_steps
from sdxl_core.training.state import LOSSES, Snapshot, load_newest, read_generation, remove_partials
from sdxl_core.training.stepping import Gathered, Stepper, StepResult
from sdxl_core.training.text_outputs import TextOutputs
from sdxl_core.training.training_set import TrainingSet, read_training_set
from sdxl_core.training.updates import Updater
from sdxl_core.training.watch import Watch, memory_gb

WAIT = timedelta(days=7)  # while one process encodes captions, draws or writes; the launcher ends all if one dies
logger = logging.getLogger(__name__)


def train(config: TrainConfig, *, stop: StopSignal) -> bool:
    """Train from the newest state to the end. Returns False where `stop` ended it early (its state is saved).

    Raises: ConfigError, DataError, CheckpointError, DiskFullError.   TrainingError: too many losses are not finite.
    """
    accelerator = make_accelerator(config)
    training_set = read_training_set(config)
    run = Run(config, accelerator, training_set, training_set.plan(config), stop=stop)
    finished = run.to_the_end(stop) and run.finish(stop)
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
        kwargs_handlers=[InitProcessGroupKwargs(timeout=WAIT)],
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
        self,
        config: TrainConfig,
        accelerator: Accelerator,
        training_set: TrainingSet,
        plan: EpochPlan,
        *,
        stop: StopSignal | None = None,
    ) -> None:
        self.config, self.accelerator, self.plan, self.training_set = config, accelerator, plan, training_set
        self.state = config.out / "state"
        self.total = total_steps(config, steps_per_epoch=plan.num_steps)
        self.settings = run_settings(config, training_set)
        self.save_times = SaveTimes(config, steps_per_epoch=plan.num_steps)
        self._refuse_what_cannot_fit()
        generation = load_newest(self.state, settings=self.settings, formerly=former_settings(config))
        self.models = load_trained_models(config, device=accelerator.device)
        self.denoiser: Denoiser = self.models.denoiser
        self.is_sharded = config.parallel == "fsdp" and accelerator.num_processes > 1
        self.writes = self.is_sharded or accelerator.is_main_process  # states, or its part of them
        model = self._divided()
        self.updater = self._updater()
        self.guard = Guard(
            max_bad_steps=config.max_bad_steps, spike_factor=config.spike_factor, metadata_name=config.metadata.name
        )
        self.average = LossAverage(self.state / LOSSES if accelerator.is_main_process else None, plan.num_steps)
        rank, num_ranks = (accelerator.process_index, accelerator.num_processes) if self.is_sharded else (0, 1)
        self.run_state = RunState(
            self.updater, config=config, settings=self.settings, training_set=training_set, average=self.average,
            guard=self.guard, writes=self.writes,
        )  # fmt: skip
        self.saver = Saver(self.state, keep=config.keep_states, rank=rank, num_ranks=num_ranks)
        self.start = self.run_state.restore(generation) if generation else 0
        self.safe: Snapshot | None = None
        self.batches = BatchMaker(training_set, plan, config, rank=accelerator.process_index)
        self.watch = Watch(config, accelerator, settings=self.settings, total=self.total)
        self.stepper = Stepper(
            model, self.updater, config=config, accelerator=accelerator, batches=self.batches, guard=self.guard,
            ema=self.run_state.ema, save_is_due=self.save_times.minutes_are_over, texts=self._text_outputs(stop),
            scaling_factor=float(component_config(self.models.preset, "vae")["scaling_factor"]),
        )  # fmt: skip
        self.time = self.stepper.time
        self.heldout = HeldOut(config, training_set, self.batches, total=self.total)
        self.preview_at = preview_steps(config, self.total, steps_per_epoch=plan.num_steps)

    def _refuse_what_cannot_fit(self) -> None:
        """Before anything is loaded. Raises: ConfigError: the card is too small."""
        if self.accelerator.device.type == "cuda":
            width_px, height_px = max(self.training_set.buckets, key=lambda size: size[0] * size[1])
            card_bytes = torch.cuda.get_device_properties(self.accelerator.device).total_memory
            preset = preset_of(self.config.base_model)
            check_card(self.config, preset, card_bytes=card_bytes, width_px=width_px, height_px=height_px)

    def _text_outputs(self, stop: StopSignal | None) -> TextOutputs | None:
        """Of frozen text encoders, computed by the first process where they are not there yet, until `stop`."""
        config = self.config
        if not config.cache_text_encoder_outputs:
            return None
        encoder: Any = self.denoiser.text_encoder
        made_by = (self.settings["base_model"], config.max_token_length, config.weighted_captions, encoder.dtype)
        folder = config.out / "text_outputs" / digest_of(*map(str, made_by))[:16]
        device = self.accelerator.device
        leave = (lambda: False) if stop is None else stop.is_set
        tokens = self.batches.plain_tokens()
        self._on_main(lambda: TextOutputs(folder, self.denoiser).add(tokens, device=device, leave=leave))
        return TextOutputs(folder, self.denoiser)

    def _divided(self) -> torch.nn.Module:
        if self.config.torch_compile:
            self.denoiser.unet.compile()
        if self.is_sharded:
            shard(self.denoiser, device=self.accelerator.device)
            self.models = self.models.regrouped()
        elif self.accelerator.num_processes > 1:
            return replicate(self.denoiser, device=self.accelerator.device)
        return self.denoiser

    def _updater(self) -> Updater:
        config = self.config
        optimizer = SlotOptimizer(
            self.models.groups,
            kind=config.optimizer,
            betas=config.adam_betas,
            eps=config.adam_epsilon,
            weight_decay=config.weight_decay,
            seed=config.seed,
            arguments=config.optimizer_args,
            rounding=config.weights_rounding,
        )
        self.lr_factor = lr_schedule(config, total_steps=self.total)
        updater = Updater(optimizer, self.models.groups, max_grad_norm=config.max_grad_norm, lr_factor=self.lr_factor)
        if config.fused_backward:
            updater.fuse()
        return updater

    def to_the_end(self, stop: StopSignal) -> bool:
        """Every step that is left, and the measurement behind the last. False where `stop` ended it; state saved.

        Raises: ConfigError: nothing is left.   TrainingError: too many bad steps.   DiskFullError.
        """
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
        self._on_main(lambda: remove_partials(self.state))
        self.watch.start(self.start)
        step, stopped = self.start, False
        if self._any(not self._was_looked_at(step)):
            stopped = self._first_look(step, stop)
            if stopped and step == 0:  # there is nothing to save
                return False
        while step < self.total and not stopped:
            step, stopped = self._run_from(step, stop)
        self.saver.wait()
        self.accelerator.wait_for_everyone()
        return step == self.total and not self._any(not self._was_looked_at(step))

    def _run_from(self, start: int, stop: StopSignal) -> tuple[int, bool]:
        """Steps from `start` to the end, to a stop, or to one that the run has to go back for.

        Returns after how many steps it is, and whether it was asked to stop.
        """
        feed = self.batches.steps(start, self.total)
        for step in range(start, self.total):
            self._keep_safe(step)
            began_s = time.monotonic()
            with self.time("data"):
                batches = next(feed)
            result = None if self.guard.is_known_bad(step) else self.stepper.step(step, batches, stop)
            if result is None or result.fault:
                if result is not None and result.moved:
                    assert self.safe is not None
                    return self.run_state.go_back(self.safe), False
                self.average.add(step, self.average.value)
            else:
                self._account(step, result, began_s=began_s)
            done = step + 1
            asked = result.gathered if result else Gathered(losses={}, stop=False, save=False)
            leaves = asked.stop or self._look(done, stop)  # who asks may not wait for pictures
            if leaves or asked.save or done == self.total or self.save_times.state_is_due(done):
                self._save(done, leaving=leaves or done == self.total)
            if leaves and done < self.total:
                logger.info("asked to stop: state saved at step %d of %d", done, self.total)
                return done, True
        return self.total, False

    def _account(self, step: int, result: StepResult, *, began_s: float) -> None:
        """Of a step that was applied."""
        if self.run_state.ema is not None:
            self.run_state.ema.after_step(step + 1)
        loss = result.gathered.loss
        self.average.add(step, loss)
        factor = self.lr_factor(step)
        scalars = {
            "loss": loss,
            "avr_loss": self.average.value,
            "grad_norm": result.grad_norm,
            "images_per_s": len(result.gathered.losses) / (time.monotonic() - began_s),
            "memory_gb": memory_gb(self.accelerator.device),
            **{f"lr/{group.name}": group.learning_rate * factor for group in self.models.groups},
            **{f"seconds/{stage}": seconds for stage, seconds in self.time.take().items()},
        }
        if result.update_share is not None:
            scalars["update_share"] = result.update_share
        self.watch.report(step + 1, scalars)

    def _keep_safe(self, step: int) -> None:
        """Before step `step`: a copy to go back to, where one may be needed and the last is too old."""
        config = self.config
        if not (config.fused_backward and config.max_bad_steps):
            return
        if self.safe is None or step - self.safe.step >= config.snapshot_every_steps:
            self.saver.wait()
            self.safe = None  # never two of them
            with self.time("save"):
                self.safe = self.run_state.snapshot(step)
            self.stepper.back_to = step

    def _save(self, done: int, *, leaving: bool) -> None:
        """`leaving`: no step follows, so what is saved need not be copied first."""
        with self.time("save"):
            self.save_times.saved()
            if not self.writes:
                return
            self.saver.wait()
            snapshot = self.run_state.snapshot(done, copy=not leaving)
            name = self.save_times.model_name(done) if done < self.total else ""
            self.saver.submit(snapshot, then=self._model_writer(name) if name else None)

    def _model_writer(self, name: str) -> Callable[[Path], None]:
        def write(generation: Path) -> None:
            path = self.config.out / "model" / name
            save_checkpoint(read_generation(generation, verify=False), path=path)
            remove_old_models(path.parent, self.config)

        return write

    def _on_main(self, work: Callable[[], None]) -> None:
        if self.accelerator.is_main_process:
            work()
        self.accelerator.wait_for_everyone()

    def _was_looked_at(self, step: int) -> bool:
        """False before the first step, and where a stop cut short what was to be looked at after `step` steps."""
        if step == 0:
            return False
        previews = step in self.preview_at and step < self.total
        drawn = not previews or all(path.exists() for path in preview_paths(self.config, step))
        return drawn and (not self.heldout.is_due(step) or self.heldout.is_measured(step))

    def _first_look(self, step: int, stop: StopSignal) -> bool:
        """Before the first step of this process. Divided weights must first pass through the whole model, not through a

        part of it. Returns as `_look`.
        """
        if self.is_sharded and step in self.preview_at:
            with torch.no_grad():
                self.stepper.losses(self.batches.make(0, 0))
        return self._look(step, stop)

    def _look(self, step: int, stop: StopSignal) -> bool:
        """Previews and the held-out loss, where they are due after `step` optimizer steps.

        Returns whether it was left early, because a process was asked to stop; the same on all of them.
        """
        if step in self.preview_at and step < self.total and self._previews(step, stop):
            return True
        if not self.heldout.is_due(step):
            return False
        found = self.heldout.measure(
            self.stepper.losses,
            step=step,
            rank=self.accelerator.process_index,
            num_processes=self.accelerator.num_processes,
            gather=self.accelerator.gather,
            leave=lambda: self._any(stop.is_set()),
        )
        if found is None:
            return True
        self.accelerator.log(self.heldout.scalars(found), step=step)
        self._on_main(lambda: self.heldout.keep(found))
        return False

    def _any(self, flag: bool) -> bool:
        """Is it true of any process? All of them must call this."""
        if self.accelerator.num_processes == 1:
            return flag
        flags = self.accelerator.gather(torch.tensor([float(flag)], device=self.accelerator.device))
        return bool(flags.any())

    def _previews(self, step: int, stop: StopSignal) -> bool:
        """Of divided weights every process makes them, because every process is needed; one writes them.

        Returns whether a process was asked to stop meanwhile.
        """
        if self.writes:
            leave = (lambda: self._any(stop.is_set())) if self.is_sharded else stop.is_set
            keep = self.accelerator.is_main_process
            write_previews(self.denoiser, self.config, step=step, keep=keep, leave=leave)
        self.accelerator.wait_for_everyone()
        return self._any(stop.is_set())

    def finish(self, stop: StopSignal) -> bool:
        """Previews, the single-file checkpoint, and last the record that says all is done.

        Returns False where `stop` came during the previews: the run is finished when it is started again.
        """
        if self.preview_at and self._previews(self.total, stop):
            return False
        self._on_main(self._finish)
        return True

    def _finish(self) -> None:
        config = self.config
        generation = read_generation(self.state / f"step-{self.total:08d}", verify=False)
        paths = [path for step in self.preview_at for path in preview_paths(config, step)]
        write_result(
            config,
            self.settings,
            CheckpointRef(
                file=save_checkpoint(generation, path=model_path(config), config=config),
                state=self.state,
                tensorboard=self.watch.tensorboard(),
                samples=tuple(path for path in paths if path.exists()),
                num_steps=self.total,
                num_images=self.plan.num_samples,
                final_avr_loss=self.average.value,
                parents=(self.training_set.digest, self.settings["base_model"]),
            ),
        )
