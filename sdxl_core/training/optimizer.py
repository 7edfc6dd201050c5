"""Any optimizer, one parameter at a time: torch's, bitsandbytes' 8-bit ones, transformers' Adafactor, `module.Class`.

A single library optimizer holds one float32 *slot*; for each parameter the slot is pointed at its weights, gradient
and states, and the library does its own step. bf16 weights are copied to float32 for that and come back by stochastic
rounding or with what rounding left over (rounding.py), so a step needs memory for one parameter more, and the
arithmetic is the library's in either dtype. A parameter can be stepped as soon as its gradient is there.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from sdxl_core.errors import CheckpointError, ConfigError
from sdxl_core.files import digest_of
from sdxl_core.training.optimizer_kinds import library_optimizer
from sdxl_core.training.rounding import RoundingNoise, round_into, split_into, with_rest

QUANT_MAPS = {"qmap1": "dynamic", "qmap2": "udynamic"}  # bitsandbytes' constant code books: never saved
REST = "rest"  # of compensated rounding, in the state files
MIN_8BIT_ELEMENTS = 4096  # smaller parameters have float32 states: bitsandbytes' own rule
Rounding = Literal["stochastic", "kahan"]


@dataclass(frozen=True, slots=True, kw_only=True)
class ParameterGroup:
    """Parameters that share a learning rate. `names`: unique over all groups, as the state files call them."""

    name: str
    names: tuple[str, ...]
    parameters: tuple[nn.Parameter, ...]
    learning_rate: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Shard:
    """The part of a parameter that a process holds: its elements from `start` on, of `num_elements` in all."""

    start: int
    num_elements: int


def parameter_group(name: str, module: nn.Module, learning_rate: float) -> ParameterGroup:
    """The trainable parameters of `module`, named `name.<parameter>`."""
    found = [(key, value) for key, value in module.named_parameters() if value.requires_grad]
    return ParameterGroup(
        name=name,
        names=tuple(f"{name}.{key}" for key, _ in found),
        parameters=tuple(value for _, value in found),
        learning_rate=learning_rate,
    )


def clip_factor(norm: Tensor, *, max_norm: float) -> Tensor:
    """What gradients are multiplied with so that their joint norm is at most `max_norm` (0: never); in (0, 1].

    As torch.nn.utils.clip_grad_norm_.
    """
    if max_norm == 0:
        return torch.ones_like(norm)
    return (max_norm / (norm + 1e-6)).clamp(max=1.0)


class SlotOptimizer:
    """An optimizer over parameter groups, stepped one parameter at a time through a single float32 slot.

    `begin` opens a step, `step_parameter` is called for each parameter when its gradient is there (by a gradient hook,
    for example), and `finish` closes it.
    """

    def __init__(
        self,
        groups: Sequence[ParameterGroup],
        *,
        kind: str,
        betas: tuple[float, float],
        eps: float,
        weight_decay: float,
        seed: int,
        arguments: Mapping[str, Any] | None = None,
        rounding: Rounding = "stochastic",
    ) -> None:
        """Args:   kind: a key of NAMED in optimizer_kinds.py, or `module.Class`; `arguments`: more of its arguments.
                betas, eps, weight_decay: for the named kinds that have them.
                rounding: of bf16 weights.   seed: of the stochastic rounding.
        Parameters must be contiguous float32 or bfloat16, on one device. Raises: ConfigError: an unusable optimizer.
        """
        self.groups = tuple(groups)
        self.seed, self.rounding = seed, rounding
        self.states: dict[str, dict[str, Any]] = {}
        self.rests: dict[str, Tensor] = {}
        device = next(p.device for group in groups for p in group.parameters)
        self._slot = nn.Parameter(torch.empty(0, device=device))
        general = {"betas": betas, "eps": eps, "weight_decay": weight_decay}
        self._library = library_optimizer(kind, self._slot, general=general, arguments=arguments or {})
        self._options = {key: value for key, value in self._library.param_groups[0].items() if key != "params"}
        self._positions: dict[str, int] = {}
        position = 0
        for _, name, parameter in self._walk():
            self._positions[name] = position
            position += parameter.numel()
        self._noise = RoundingNoise(key=0, device=device)
        self._lr_factor = 0.0
        self._moved: list[Tensor] = []
        self._wanted: list[Tensor] = []

    def begin(self, *, step: int, lr_factor: float) -> None:
        """Open optimizer step `step` of the run, at `lr_factor` of each group's learning rate."""
        key = int(digest_of("rounding", self.seed, step)[:16], 16)
        self._noise = RoundingNoise(key=key, device=self._slot.device)
        self._lr_factor = lr_factor

    @torch.no_grad()
    def step_parameter(
        self,
        group: ParameterGroup,
        name: str,
        parameter: Tensor,
        gradient: Tensor,
        *,
        grad_factor: Tensor | float = 1.0,
        shard: Shard | None = None,
    ) -> None:
        """Update one parameter within the step that `begin` opened, in any order, once each. Nothing waits for a GPU.

        Args:   name: as `group.names` has it.   parameter: its weights, or this process's `shard` of them (plain
                tensors, no DTensor), changed in place.   gradient: of the same shape, float32 or bfloat16; may be
                overwritten.   grad_factor: what it is multiplied with first.
        """
        weights = parameter.detach()
        num_elements, start = (shard.num_elements, shard.start) if shard else (weights.numel(), 0)
        learning_rate = group.learning_rate * self._lr_factor
        values = gradient.to(torch.float32) * grad_factor
        if weights.dtype == torch.float32:
            self._library_step(name, weights, values, learning_rate, num_elements)
            return
        rest = self._rest(name, weights)

        def current() -> Tensor:
            return weights if rest is None else with_rest(weights, rest)

        after = current().to(torch.float32)
        self._library_step(name, after, values, learning_rate, num_elements)
        before = current()
        update = torch.sub(after, before, out=values).view(-1)
        if rest is None:
            before = before.clone()
            round_into(weights, after, self._noise, position=self._positions[name] + start)
        else:
            split_into(weights, rest, after)
        applied = torch.sub(current(), before, out=after).view(-1)
        self._wanted.append(torch.dot(update, update))
        self._moved.append(torch.dot(applied, update))

    def finish(self) -> Tensor | None:
        """Close the step. Returns float32 [2]: applied · computed and computed · computed update, over bf16 weights.

        Sums of several processes' shards may be added before `share_of` divides them. None for float32 weights.
        """
        moved, wanted, self._moved, self._wanted = self._moved, self._wanted, [], []
        if not moved:
            return None
        return torch.stack([torch.stack(moved).sum(), torch.stack(wanted).sum()])

    def _rest(self, name: str, weights: Tensor) -> Tensor | None:
        if self.rounding == "stochastic":
            return None
        if name not in self.rests:
            self.rests[name] = torch.zeros_like(weights, dtype=torch.int16)
        return self.rests[name]

    def _library_step(
        self, name: str, values: Tensor, gradient: Tensor, learning_rate: float, num_elements: int
    ) -> None:
        """`num_elements`: of the whole parameter: it decides about 8-bit states, so shards agree with the whole."""
        is_new = name not in self.states
        state = self.states.setdefault(name, {})
        options = self._library.param_groups[0]
        options.update(self._options | state.pop("options", {}), lr=learning_rate)
        if is_new and hasattr(self._library, "name2qmap"):
            smallest = 0 if num_elements >= MIN_8BIT_ELEMENTS else values.numel() + 1
            self._library.args.min_8bit_size = smallest  # type: ignore[attr-defined]
        self._slot.data, self._slot.grad = values, gradient
        if state:
            self._library.state[self._slot] = state
        self._library.step()
        state = self._library.state.pop(self._slot, {})
        changed = {k: v for k, v in options.items() if k not in ("params", "lr") and v != self._options.get(k)}
        self.states[name] = state | ({"options": changed} if changed else {})
        self._slot.grad = None
        self._slot.data = values.new_empty(0)
        if is_new:
            self._check_can_be_saved(self.states[name])

    def _check_can_be_saved(self, state: dict[str, Any]) -> None:
        values = {**state, **state.get("options", {})}
        values.pop("options", None)
        odd = [
            key for key, value in values.items() if not isinstance(value, (Tensor, int, float, str, bool, type(None)))
        ]
        odd += [key for key, value in state.get("options", {}).items() if isinstance(value, Tensor)]
        if odd:
            raise ConfigError(
                f"optimizer: {type(self._library).__name__} keeps {', '.join(odd)} in its state, which is neither a "
                f"tensor nor a number, so a run could not continue from a saved state. Choose another optimizer."
            )

    def _walk(self) -> Iterable[tuple[ParameterGroup, str, nn.Parameter]]:
        for group in self.groups:
            for name, parameter in zip(group.names, group.parameters, strict=True):
                yield group, name, parameter

    def state_tensors(self) -> dict[str, Tensor]:
        """Every state tensor as `<parameter>/<state>`, except the 8-bit code books, which are constant."""
        tensors = {
            f"{name}/{key}": value
            for name, state in self.states.items()
            for key, value in state.items()
            if isinstance(value, Tensor) and key not in QUANT_MAPS
        }
        return tensors | {f"{name}/{REST}": rest for name, rest in self.rests.items()}

    def state_scalars(self) -> dict[str, dict[str, Any]]:
        """The states that are plain numbers, by parameter: JSON-ready."""
        return {
            name: {key: value for key, value in state.items() if not isinstance(value, Tensor)}
            for name, state in self.states.items()
        }

    def load_state(self, tensors: dict[str, Tensor], scalars: dict[str, dict[str, Any]]) -> None:
        """Take over what `state_tensors` and `state_scalars` gave, on any device.

        Raises: CheckpointError: the state is of other parameters.
        """
        known = {name: parameter for _, name, parameter in self._walk()}
        unknown = sorted(set(scalars) - set(known))
        if unknown:
            raise CheckpointError(
                f"the optimizer state is of other parameters ({unknown[0]} and {len(unknown) - 1} more are not trained "
                f"here). Train into another out folder, or delete the state folder to start again."
            )
        earlier, self.states = self.states, {name: dict(state) for name, state in scalars.items()}
        self.rests = {}
        for path, value in tensors.items():
            name, _, key = path.rpartition("/")
            if key == REST:
                self.rests[name] = value.to(known[name].device)
            else:
                self.states[name][key] = self._placed(value, earlier.get(name, {}).get(key), known[name].device)
        self._attach_quant_maps()

    def _placed(self, value: Tensor, earlier: Any, device: torch.device) -> Tensor:
        """A state where the library keeps it: numbers on the CPU, 8-bit states of a paged optimizer in its pages.

        `earlier`: what is there so far; pages are used again, because bitsandbytes never frees them.
        """
        if not value.dim():
            return value
        library: Any = self._library
        if value.dtype == torch.uint8 and getattr(library, "is_paged", False):
            if earlier is None or earlier.shape != value.shape:
                earlier = library.get_state_buffer(torch.empty(1, device=device).expand(value.shape), dtype=value.dtype)
            pages: Tensor = earlier.copy_(value)
            return pages
        return value.to(device)

    def _attach_quant_maps(self) -> None:
        """Give 8-bit states their code books again."""
        for state in self.states.values():
            for key, source in QUANT_MAPS.items():
                if key.replace("qmap", "absmax") in state:
                    maps = self._library.name2qmap  # type: ignore[attr-defined]
                    if source not in maps:
                        self._library.fill_qmap()  # type: ignore[attr-defined]
                    maps[source] = maps[source].to(self._slot.device)
                    state[key] = maps[source]


def share_of(sums: Tensor) -> float:
    """Share of the computed update that reached the weights, from `SlotOptimizer.finish`; 1 is all of it."""
    moved, wanted = sums.tolist()
    return float(moved / wanted) if wanted else 1.0
