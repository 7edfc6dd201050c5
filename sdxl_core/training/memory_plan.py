"""What a training run needs, in bytes by component, from shapes alone: nothing is loaded.

Weights, gradients, states and averages are counted exactly, tensor by tensor. Activations are counted by running the
U-Net on meta tensors and adding up what the backward pass keeps; the card's own needs are an estimate.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from sdxl_core.config.train import PlanConfig, TrainOptions
from sdxl_core.errors import ConfigError
from sdxl_core.models.load import meta_module, preset_of
from sdxl_core.models.presets import Component, Preset, tensor_shapes
from sdxl_core.refs import MemoryPlan
from sdxl_core.training.activations import kept_bytes
from sdxl_core.training.denoiser import Denoiser
from sdxl_core.training.optimizer import MIN_8BIT_ELEMENTS
from sdxl_core.training.parallel import DDP_BUCKET_MIB, piece_of_shape, sharded_modules
from sdxl_core.training.parts import choose_trained
from sdxl_core.training.rates import learning_rates

GIB = 2**30
LIMIT_ELEMENTS = 2**31  # libraries count elements of one buffer in 32 bits
CARD_CONTEXT_BYTES = 800_000_000  # CUDA context, cuBLAS and cuDNN workspaces
SLACK = 0.03  # what the allocator loses to rounding
NOISE_BYTES = 3 * 4 * (1 << 25)  # of stochastic rounding: bits of one chunk, and two scratch buffers
STATES_8BIT = {"adamw8bit": 2, "pagedadamw8bit": 2, "lion8bit": 1}
BYTES = {"float32": 4, "bfloat16": 2}


@dataclass(frozen=True, slots=True)
class _Weight:
    """A parameter of `part`. itemsize: bytes an element; count: elements that one process holds."""

    part: str
    shape: tuple[int, ...]
    numel: int
    count: int
    itemsize: int
    trains: bool


def plan_memory(options: TrainOptions, preset: Preset, *, width_px: int, height_px: int) -> MemoryPlan:
    """The memory of a run whose largest bucket is width_px x height_px.

    Raises: ConfigError: `freeze` patterns that cannot be right.
    """
    modules = _meta_modules(preset)
    choose_trained(modules, options, preset)
    weights = list(_weights(modules, options))
    trained = [weight for weight in weights if weight.trains]
    on_card = [weight for weight in weights if weight.part == "unet" or not options.cache_text_encoder_outputs]
    is_divided = _is_divided(options)
    groups = _group_sizes(modules, options.num_processes if is_divided else 1)
    size = BYTES[options.weights_dtype]
    states = sum(_state_bytes(weight, options) for weight in trained)
    paged = options.optimizer == "pagedadamw8bit"
    card = {
        "weights: U-Net": sum(w.count * w.itemsize for w in on_card if w.part == "unet"),
        "weights: text encoders": sum(w.count * w.itemsize for w in on_card if w.part != "unet"),
        "weights gathered for a block": 2 * max(groups) * size if is_divided else 0,
        "gradients": _gradient_bytes(trained, options, max(groups)),
        "optimizer states": 0 if paged else states,
        "one weight's update": _slot_bytes(trained, options),
        "activations (estimate)": kept_bytes(modules, options, preset, width_px=width_px, height_px=height_px),
    }
    card["context, workspaces, rounding (estimate)"] = CARD_CONTEXT_BYTES + round(SLACK * sum(card.values()))
    held = sum(weight.count for weight in trained)
    average = 4 * held if options.ema_decay is not None else 0
    copy = held * size + states + average
    return MemoryPlan(
        card=card,
        host={
            "average of the weights": average and average + held * size,
            "copy while a state is saved": copy,
            "copy to go back to": copy if options.fused_backward and options.max_bad_steps else 0,
            "optimizer states (paged)": states if paged else 0,
        },
        disk=_disk(options, weights, preset),
        num_trained=sum(weight.numel for weight in trained),
        num_parameters=sum(weight.numel for weight in weights),
        largest_buffer=_largest_buffer(options, trained, groups),
    )


def check_card(options: TrainOptions, preset: Preset, *, card_bytes: int, width_px: int, height_px: int) -> MemoryPlan:
    """The plan, if it fits a card of `card_bytes`. Raises: ConfigError: it does not; names the cheapest change."""
    plan = plan_memory(options, preset, width_px=width_px, height_px=height_px)
    check_fits(plan, options, preset, card_bytes=card_bytes, width_px=width_px, height_px=height_px)
    return plan


def check_fits(
    plan: MemoryPlan, options: TrainOptions, preset: Preset, *, card_bytes: int, width_px: int, height_px: int
) -> None:
    """Args: plan: of these options.   Raises: as `check_card`."""
    if plan.largest_buffer >= LIMIT_ELEMENTS:
        raise ConfigError(f"one buffer of {plan.largest_buffer:,} elements; libraries count to {LIMIT_ELEMENTS:,}.")
    if plan.card_bytes <= card_bytes:
        return
    change = cheapest_change(options, preset, card_bytes=card_bytes, width_px=width_px, height_px=height_px)
    advice = "No change of settings makes it fit: train fewer parts, or take a larger card."
    if change is not None:
        names, smaller = change
        advice = f"The cheapest change that fits: {' and '.join(names)} ({_gib(smaller.card_bytes)})."
    largest = max(plan.card, key=lambda name: plan.card[name])
    raise ConfigError(
        f"training at {width_px}x{height_px} needs {_gib(plan.card_bytes)} of a card's {_gib(card_bytes)}, most of it "
        f"{largest} ({_gib(plan.card[largest])}). {advice} `sdxl-flows plan` prints all components."
    )


def cheapest_change(
    options: TrainOptions, preset: Preset, *, card_bytes: int, width_px: int, height_px: int
) -> tuple[list[str], MemoryPlan] | None:
    """What to change so that it fits: one change if one is enough, else as many as it takes; the cheapest first.

    Cheap is what costs neither result nor speed. None: nothing helps.
    """

    def plan(changes: Mapping[str, Any]) -> MemoryPlan:
        return plan_memory(options.model_copy(update=dict(changes)), preset, width_px=width_px, height_px=height_px)

    possible = list(_changes(options))
    for name, change in possible:
        found = plan(change)
        if found.card_bytes <= card_bytes:
            return [name], found
    names: list[str] = []
    together: dict[str, Any] = {}
    for name, change in possible:
        names = [other for other in names if other.split(" = ")[0] != name.split(" = ")[0]] + [name]
        together |= change
        if plan(together).card_bytes <= card_bytes:
            break
    else:
        return None
    for name, change in possible:  # the cheap ones that were not enough may not be needed beside the others
        without = {key: value for key, value in together.items() if key not in change}
        if name in names and plan(without).card_bytes <= card_bytes:
            names.remove(name)
            together = without
    return names, plan(together)


def planned(config: PlanConfig) -> MemoryPlan:
    """The memory of the run that `config` describes, whether or not it fits."""
    return plan_memory(config, _preset(config), width_px=config.width_px, height_px=config.height_px)


def check_planned(plan: MemoryPlan, config: PlanConfig) -> None:
    """Raises: ConfigError: `plan` does not fit a card of `card_gb`; names the cheapest change that would."""
    if config.card_gb is not None:
        size = {"width_px": config.width_px, "height_px": config.height_px}
        check_fits(plan, config, _preset(config), card_bytes=int(config.card_gb * GIB), **size)


def _preset(options: TrainOptions) -> Preset:
    """A base model that is not there yet counts as SDXL."""
    is_there = options.base_model == "tiny" or Path(options.base_model).exists()
    return preset_of(options.base_model) if is_there else "sdxl"


def _changes(options: TrainOptions) -> Iterator[tuple[str, dict[str, Any]]]:
    rates = learning_rates(options)
    texts_train = bool(rates["text_encoder"] or rates["text_encoder_2"])
    if not texts_train and not options.cache_text_encoder_outputs and not options.shuffle_caption:
        yield "cache_text_encoder_outputs = true", {"cache_text_encoder_outputs": True}
    if options.num_processes == 1 and options.gradient_accumulation_steps == 1 and not options.fused_backward:
        yield "fused_backward = true", {"fused_backward": True}
    if options.num_processes > 1 and options.parallel == "ddp":
        yield 'parallel = "fsdp"', {"parallel": "fsdp"}
    if options.weights_dtype == "float32":
        yield 'weights_dtype = "bfloat16"', {"weights_dtype": "bfloat16"}
    if options.optimizer not in STATES_8BIT:
        yield 'optimizer = "adamw8bit"', {"optimizer": "adamw8bit"}
    for mode in ("blocks", "all"):
        if options.gradient_checkpointing == "none" or (options.gradient_checkpointing, mode) == ("blocks", "all"):
            yield f'gradient_checkpointing = "{mode}"', {"gradient_checkpointing": mode}
    if options.optimizer != "pagedadamw8bit":
        yield 'optimizer = "pagedadamw8bit"', {"optimizer": "pagedadamw8bit"}
    if options.train_batch_size > 1:
        yield "train_batch_size = 1", {"train_batch_size": 1}
    if rates["text_encoder_2"]:
        yield "learning_rate_te2 = 0", {"learning_rate_te2": 0.0}


def smallest_card_gib() -> float | None:
    """Memory of the smallest CUDA card of this machine, None where there is none."""
    sizes = [torch.cuda.get_device_properties(index).total_memory for index in range(torch.cuda.device_count())]
    return min(sizes) / GIB if sizes else None


def describe_plan(plan: MemoryPlan, *, card_gib: float | None = None) -> str:
    """The plan as a table, with sums and what is left of a card that it fits."""
    lines = [f"{plan.num_trained:,} of {plan.num_parameters:,} parameters train"]
    for title, parts in (("each card", plan.card), ("main memory, each process", plan.host), ("disk", plan.disk)):
        lines += [f"\n{title}"]
        lines += [f"  {name:<48}{_gib(size):>10}" for name, size in parts.items() if size]
        lines += [f"  {'together':<48}{_gib(sum(parts.values())):>10}"]
    if card_gib is None:
        lines += ["\nno card to hold it against here: --card-gb 24 says whether it fits one of 24 GiB"]
    else:
        left = _gib(int(card_gib * GIB) - plan.card_bytes)
        lines += [f"\nit fits a card of {card_gib:.2f} GiB, {left} are left"]
    lines += [f"largest single buffer: {plan.largest_buffer:,} elements (limit {LIMIT_ELEMENTS:,})"]
    return "\n".join(lines)


def _gib(num_bytes: int) -> str:
    return f"{num_bytes / GIB:.2f} GiB"


def _is_divided(options: TrainOptions) -> bool:
    return options.parallel == "fsdp" and options.num_processes > 1


def _weights(modules: Mapping[str, nn.Module], options: TrainOptions) -> Iterator[_Weight]:
    for part, module in modules.items():
        for parameter in module.parameters():
            yield _weight(part, tuple(parameter.shape), options, trains=parameter.requires_grad)


def _weight(part: str, shape: tuple[int, ...], options: TrainOptions, *, trains: bool) -> _Weight:
    half = options.weights_dtype == "bfloat16" or options.mixed_precision == "bf16"
    itemsize = BYTES[options.weights_dtype] if learning_rates(options)[part] else (2 if half else 4)
    num_ranks = options.num_processes if _is_divided(options) else 1
    piece = piece_of_shape(shape, rank=0, num_ranks=num_ranks)  # no process holds more than the first
    return _Weight(part, shape, piece.total, piece.count, itemsize, trains)


def _group_sizes(modules: Mapping[str, Any], num_ranks: int) -> list[int]:
    """Elements of what FSDP2 gathers at once, rows padded to a multiple of the processes."""
    seen: set[int] = set()
    sizes = []
    for module in sharded_modules(Denoiser(**modules)):
        own = [parameter for parameter in module.parameters() if id(parameter) not in seen]
        seen.update(map(id, own))
        sizes.append(sum(piece_of_shape(tuple(p.shape), rank=0, num_ranks=num_ranks).count * num_ranks for p in own))
    return sizes


def _gradient_bytes(trained: list[_Weight], options: TrainOptions, largest_group: int) -> int:
    size = BYTES[options.weights_dtype]
    if options.fused_backward:
        return 2 * size * max(weight.count for weight in trained)
    whole = 2 * largest_group * size if _is_divided(options) else 0
    return size * sum(weight.count for weight in trained) + whole


def _state_bytes(weight: _Weight, options: TrainOptions) -> int:
    rest = 2 * weight.count if options.weights_dtype == "bfloat16" and options.weights_rounding == "kahan" else 0
    num_states = STATES_8BIT.get(options.optimizer)
    if num_states and weight.numel >= MIN_8BIT_ELEMENTS:
        return rest + num_states * (weight.count + 4 * -(-weight.count // 256))
    if options.optimizer == "adafactor" and len(weight.shape) > 1:
        return rest + 4 * (weight.numel // weight.shape[-1] + weight.numel // weight.shape[-2])
    return rest + 4 * weight.count * (1 if options.optimizer in ("adafactor", "lion8bit") else 2)


def _slot_bytes(trained: list[_Weight], options: TrainOptions) -> int:
    """float32 gradient (and the product with its factor), weights before and after; the noise of rounding."""
    largest = max(weight.count for weight in trained)
    return 14 * largest + NOISE_BYTES if options.weights_dtype == "bfloat16" else 8 * largest


def _largest_buffer(options: TrainOptions, trained: list[_Weight], groups: list[int]) -> int:
    largest = max(weight.numel for weight in trained)
    if _is_divided(options):
        return max(groups)
    if options.num_processes > 1:
        return max(largest, (DDP_BUCKET_MIB << 20) // BYTES[options.weights_dtype] + largest)
    return largest


def disk_needs(options: TrainOptions, preset: Preset) -> tuple[int, int]:
    """Bytes of one resumable state (of all processes together) and of a model file."""
    modules = _meta_modules(preset)
    choose_trained(modules, options, preset)
    weights = list(_weights(modules, options))
    return _state_file_bytes(weights, options), _model_file_bytes(weights, options, preset)


def most_disk_needs(options: TrainOptions, preset: Preset) -> tuple[int, int]:
    """As `disk_needs`, or more where `freeze` or `block_lr` hold weights back; diffusers is not imported for it."""
    weights = [
        _weight(part, shape, options, trains=bool(rate))
        for part, rate in learning_rates(options).items()
        for shape in tensor_shapes(preset, part).values()
    ]
    return _state_file_bytes(weights, options), _model_file_bytes(weights, options, preset)


def _meta_modules(preset: Preset) -> dict[str, Any]:
    parts: tuple[Component, ...] = ("unet", "text_encoder", "text_encoder_2")
    return {part: meta_module(part, preset) for part in parts}


def _state_file_bytes(weights: list[_Weight], options: TrainOptions) -> int:
    average = 4 if options.ema_decay is not None else 0
    held = [weight for weight in weights if weight.trains]
    num_ranks = options.num_processes if _is_divided(options) else 1
    return num_ranks * sum(w.count * (w.itemsize + average) + _state_bytes(w, options) for w in held)


def _model_file_bytes(weights: list[_Weight], options: TrainOptions, preset: Preset) -> int:
    itemsize = 4 if options.save_precision == "fp32" else 2
    vae = sum(math.prod(shape) for shape in tensor_shapes(preset, "vae").values())
    return itemsize * (sum(weight.numel for weight in weights) + vae)


def _disk(options: TrainOptions, weights: list[_Weight], preset: Preset) -> dict[str, int]:
    """As far as it is known without the number of steps in an epoch."""
    num_states, model = options.keep_states + 1, _model_file_bytes(weights, options, preset)
    states = {
        f"{num_states} resumable states (one of them being written)": num_states * _state_file_bytes(weights, options)
    }
    if not (options.save_model_every_steps or options.save_model_every_epochs):
        return states | {"model file": model}
    if options.keep_models:
        num_models = options.keep_models + 2
        return states | {f"{num_models} model files (the last, one being written)": num_models * model}
    return states | {"model file, and as much again each time": model}
