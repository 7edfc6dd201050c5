"""Micro-batches, ready for the device, made a few ahead by threads. Any position can be asked for."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import lru_cache
from itertools import chain, islice

import torch
from torch import Tensor

from sdxl_core.config import TrainConfig
from sdxl_core.latents import LatentStore
from sdxl_core.models import TokenIds, component_config, time_ids, tokenize
from sdxl_core.training.caption_rules import caption_rules, plain_rules
from sdxl_core.training.captions import caption_text
from sdxl_core.training.latent_view import LatentView, view_of
from sdxl_core.training.objectives import NoiseDraw, Objective
from sdxl_core.training.order import EpochPlan, Indices, batches_of_epoch, position_of_step, samples_of_rank
from sdxl_core.training.preflight import check_record
from sdxl_core.training.training_set import Sample, TrainingSet

LOOK_AHEAD, NUM_THREADS = 4, 2


@dataclass(frozen=True, slots=True, kw_only=True)
class MicroBatch:
    """One process's part of a global micro-batch, on the CPU.

    latents:  float32 [B, 4, h, w], unscaled.   draw: noise and timesteps of the same samples.
    clip_l, clip_g: token ids, int64 [B, n, 77].   token_weights: float32 [B, n, 77], None where all are 1.
    time_ids: float32 [B, 6].
    mask:  float32 [B, 1, H, W] in [0, 1], in pixels: what of a picture is opaque; None where all of it counts.
    num_counted:  samples that count: B, or 0 where this process has none and computes one for company.
    """

    keys: tuple[str, ...]
    latents: Tensor
    draw: NoiseDraw
    clip_l: Tensor
    clip_g: Tensor
    token_weights: Tensor | None
    time_ids: Tensor
    mask: Tensor | None
    num_counted: int


class BatchMaker:
    """Makes what process `rank` sees at any step."""

    def __init__(self, training_set: TrainingSet, plan: EpochPlan, config: TrainConfig, *, rank: int) -> None:
        self.training_set, self.plan, self.config, self.rank = training_set, plan, config, rank
        self._store = LatentStore(config.latents)
        self._objective = Objective(config)
        self._scaling_factor = float(component_config("sdxl", "vae")["scaling_factor"])  # tiny's is the same
        self._batches = lru_cache(maxsize=2)(lambda epoch: batches_of_epoch(plan, epoch))
        total = config.max_train_epochs * plan.num_steps if config.max_train_epochs else config.max_train_steps
        self._rules = caption_rules(config, total_steps=total)
        self._plain_rules = plain_rules(config)

    def global_batches(self, step: int) -> list[Indices]:
        """The global micro-batches of an optimizer step."""
        epoch, positions = position_of_step(self.plan, step)
        return [self._batches(epoch)[position] for position in positions]

    def num_batches(self, step: int) -> int:
        """How many global micro-batches an optimizer step has."""
        return len(position_of_step(self.plan, step)[1])

    def keys_of(self, step: int) -> list[list[list[str]]]:
        """Sample keys of an optimizer step by [process][micro-batch][sample]: every process knows all."""
        return [
            [[sample.key for sample in self._samples(self._part(batch, rank))] for batch in self.global_batches(step)]
            for rank in range(self.config.num_processes)
        ]

    def steps(self, start: int, stop: int) -> Iterator[list[MicroBatch]]:
        """The micro-batches of steps start … stop, a list a step, a few micro-batches prepared ahead."""
        wanted = ((step, number) for step in range(start, stop) for number in range(self.num_batches(step)))
        waiting: deque[Future[MicroBatch]] = deque()
        with ThreadPoolExecutor(NUM_THREADS, thread_name_prefix="batches") as pool:
            try:
                for step in range(start, stop):
                    batches = []
                    for _ in range(self.num_batches(step)):
                        free = LOOK_AHEAD + 1 - len(waiting)
                        waiting.extend(pool.submit(self.make, *position) for position in islice(wanted, free))
                        batches.append(waiting.popleft().result())
                    yield batches
            finally:
                pool.shutdown(wait=False, cancel_futures=True)

    def make(self, step: int, number: int) -> MicroBatch:
        """The `number`-th micro-batch of an optimizer step. Raises: DataError: latents that do not fit the bucket."""
        epoch, positions = position_of_step(self.plan, step)
        batch = self._batches(epoch)[positions[number]]
        part = self._part(batch, self.rank)
        samples = self._samples(part if len(part) else batch[:1])
        keys = tuple(sample.key for sample in samples)
        views = [self._view(sample, epoch, flip_aug=self.config.flip_aug) for sample in samples]
        latents = torch.stack([view.latents for view in views])
        texts = [self.caption(sample, step) for sample in samples]
        draw = self._objective.draw(keys, latents * self._scaling_factor, epoch=epoch, seed=self.config.seed)
        return self._batch(samples, views, texts, draw, num_counted=len(part))

    def fixed(self, numbers: Indices, timesteps: tuple[int, int]) -> MicroBatch:
        """Samples as they are, whole captions, with noise and timesteps in [low, high) that are always the same."""
        samples = self._samples(numbers)
        views = [self._view(sample, 0, flip_aug=False) for sample in samples]
        texts = [caption_text(s.sentence, s.tags, self._plain_rules, epoch=0, key=s.key, step=0) for s in samples]
        draws = [
            self._objective.fixed_draw(s.key, view.latents.shape, timesteps=timesteps, seed=self.config.seed)
            for s, view in zip(samples, views, strict=True)
        ]
        draw = NoiseDraw(
            noise=torch.stack([draw.noise for draw in draws]), timesteps=torch.stack([d.timesteps for d in draws])
        )
        return self._batch(samples, views, texts, draw, num_counted=len(samples))

    def _batch(
        self, samples: list[Sample], views: list[LatentView], texts: list[str], draw: NoiseDraw, *, num_counted: int
    ) -> MicroBatch:
        tokens = tokenize(texts, max_token_length=self.config.max_token_length, weighted=self.config.weighted_captions)
        ids = time_ids(
            original_size=torch.tensor([[v.original_height_px, v.original_width_px] for v in views]),
            crop_top_left=torch.tensor([[v.crop_top_px, v.crop_left_px] for v in views]),
            target_size=torch.tensor([[s.height_px, s.width_px] for s in samples]),
        )
        return MicroBatch(
            keys=tuple(sample.key for sample in samples),
            latents=torch.stack([view.latents for view in views]),
            draw=draw,
            clip_l=tokens.clip_l,
            clip_g=tokens.clip_g,
            token_weights=tokens.weights,
            time_ids=ids,
            mask=_opaque(views, samples) if self.config.masked_loss else None,
            num_counted=num_counted,
        )

    def caption(self, sample: Sample, step: int) -> str:
        """The text of a sample that is trained on at an optimizer step."""
        epoch, _ = position_of_step(self.plan, step)
        return caption_text(sample.sentence, sample.tags, self._rules, epoch=epoch, key=sample.key, step=step)

    def plain_tokens(self) -> Iterator[TokenIds]:
        """The tokens of each sample's caption, whole, and of the empty one, one at a time."""
        texts = (caption_text(s.sentence, s.tags, self._plain_rules, epoch=0, key=s.key, step=0)
                 for s in self.training_set.samples)  # fmt: skip
        for text in chain([""], texts):
            yield tokenize(
                [text], max_token_length=self.config.max_token_length, weighted=self.config.weighted_captions
            )

    def _part(self, batch: Indices, rank: int) -> Indices:
        return samples_of_rank(batch, rank=rank, num_processes=self.config.num_processes)

    def _samples(self, numbers: Indices) -> list[Sample]:
        return self.training_set.take(numbers)

    def _view(self, sample: Sample, epoch: int, *, flip_aug: bool) -> LatentView:
        record = self._store.read(sample.key)
        check_record(self.config, sample, record)
        return view_of(record, key=sample.key, epoch=epoch, seed=self.config.seed, flip_aug=flip_aug)


def _opaque(views: list[LatentView], samples: list[Sample]) -> Tensor | None:
    """Alpha of each picture, float32 [B, 1, H, W] in [0, 1]; all ones for one without; None where none has any."""
    if all(view.alpha_mask is None for view in views):
        return None
    whole = torch.ones(samples[0].height_px, samples[0].width_px)
    return torch.stack([whole if view.alpha_mask is None else view.alpha_mask for view in views]).unsqueeze(1)
