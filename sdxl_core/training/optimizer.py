"""AdamW, torch's or bitsandbytes' 8-bit one, one parameter at a time.

A single library optimizer holds one float32 *slot*; for each parameter the slot is pointed at its weights, gradient
and states, and the library does its own step. bf16 weights are copied to float32 for that and come back by stochastic
rounding, so a step needs memory for one parameter more, and the arithmetic is the library's in either dtype.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from diffusers.optimization import get_scheduler
from torch import Tensor, nn

from sdxl_core.errors import CheckpointError
from sdxl_core.files import digest_of
from sdxl_core.training.rounding import RoundingNoise, round_into

ScheduleName = Literal["constant", "constant_with_warmup", "linear", "cosine"]
QUANT_MAPS = {"qmap1": "dynamic", "qmap2": "udynamic"}  # bitsandbytes' constant code books: never saved


@dataclass(frozen=True, slots=True, kw_only=True)
class ParameterGroup:
    """Parameters that share a learning rate. `names`: unique over all groups, as the state files call them."""

    name: str
    names: tuple[str, ...]
    parameters: tuple[nn.Parameter, ...]
    learning_rate: float


def parameter_group(name: str, module: nn.Module, learning_rate: float) -> ParameterGroup:
    """The trainable parameters of `module`, named `name.<parameter>`."""
    found = [(key, value) for key, value in module.named_parameters() if value.requires_grad]
    return ParameterGroup(
        name=name,
        names=tuple(f"{name}.{key}" for key, _ in found),
        parameters=tuple(value for _, value in found),
        learning_rate=learning_rate,
    )


def lr_factors(schedule: ScheduleName, *, num_warmup_steps: int, num_training_steps: int) -> Any:
    """diffusers' schedule as a plain function: step (from 0) -> factor of the learning rate. Nothing to resume."""
    holder = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=1.0)
    scheduler = get_scheduler(
        schedule, holder, num_warmup_steps=num_warmup_steps, num_training_steps=num_training_steps
    )
    return scheduler.lr_lambdas[0]


def gradient_norm(parameters: Iterable[nn.Parameter]) -> Tensor:
    """Joint L2 norm of all gradients, float32 scalar; accumulated in float32 even where gradients are bf16."""
    norms = [torch.linalg.vector_norm(p.grad, dtype=torch.float32) for p in parameters if p.grad is not None]
    joint: Tensor = torch.linalg.vector_norm(torch.stack(norms))
    return joint


def clip_factor(norm: Tensor, *, max_norm: float) -> Tensor:
    """What gradients are multiplied with so that their joint norm is at most `max_norm` (0: never); in (0, 1].

    As torch.nn.utils.clip_grad_norm_.
    """
    if max_norm == 0:
        return torch.ones_like(norm)
    return (max_norm / (norm + 1e-6)).clamp(max=1.0)


class SlotOptimizer:
    """AdamW over parameter groups, stepped one parameter at a time through a single float32 slot."""

    def __init__(
        self,
        groups: Sequence[ParameterGroup],
        *,
        kind: Literal["adamw", "adamw8bit"],
        betas: tuple[float, float],
        eps: float,
        weight_decay: float,
        seed: int,
    ) -> None:
        """`seed`: of the stochastic rounding. Parameters must be contiguous float32 or bfloat16, on one device."""
        self.groups = tuple(groups)
        self.seed = seed
        self.states: dict[str, dict[str, Any]] = {}
        device = next(p.device for group in groups for p in group.parameters)
        self._slot = nn.Parameter(torch.empty(0, device=device))
        options: dict[str, Any] = {"lr": 0.0, "betas": betas, "eps": eps, "weight_decay": weight_decay}
        if kind == "adamw8bit":
            import bitsandbytes

            self._library: torch.optim.Optimizer = bitsandbytes.optim.AdamW8bit([self._slot], **options)
        else:
            self._library = torch.optim.AdamW([self._slot], foreach=False, **options)

    @torch.no_grad()
    def step(self, *, step: int, lr_factor: float, grad_factor: Tensor) -> float | None:
        """Update every parameter that has a gradient, and free the gradients.

        Args:   step: of the run; the rounding is keyed by it.   lr_factor: of each group's learning rate.
                grad_factor: scalar every gradient is multiplied with (clipping).
        Returns: share of the computed update that reached bf16 weights (1 is all of it); None for float32 weights.
        """
        moved, wanted = [], []
        key = int(digest_of("rounding", self.seed, step)[:16], 16)
        noise = RoundingNoise(key=key, device=self._slot.device)
        after = 0
        for group, name, parameter in self._walk():
            position, after = after, after + parameter.numel()
            if parameter.grad is None:
                continue
            self._library.param_groups[0]["lr"] = group.learning_rate * lr_factor
            gradient = parameter.grad.to(torch.float32) * grad_factor
            parameter.grad = None
            if parameter.dtype == torch.float32:
                self._library_step(name, parameter.data, gradient)
                continue
            values = parameter.data.to(torch.float32)
            self._library_step(name, values, gradient)
            update = torch.sub(values, parameter.data, out=gradient).view(-1)
            before = parameter.data.clone()
            round_into(parameter.data, values, noise, position=position)
            applied = torch.sub(parameter.data, before, out=values).view(-1)
            moved.append(torch.dot(applied, update))
            wanted.append(torch.dot(update, update))
        if not moved:
            return None
        total = float(torch.stack(wanted).sum())
        return float(torch.stack(moved).sum()) / total if total else 1.0

    def _library_step(self, name: str, values: Tensor, gradient: Tensor) -> None:
        self._slot.data, self._slot.grad = values, gradient
        self._library.state[self._slot] = self.states.setdefault(name, {})
        self._library.step()
        self.states[name] = self._library.state.pop(self._slot)
        self._slot.grad = None
        self._slot.data = values.new_empty(0)

    def _walk(self) -> Iterable[tuple[ParameterGroup, str, nn.Parameter]]:
        for group in self.groups:
            for name, parameter in zip(group.names, group.parameters, strict=True):
                yield group, name, parameter

    def state_tensors(self) -> dict[str, Tensor]:
        """Every state tensor as `<parameter>/<state>`, except the 8-bit code books, which are constant."""
        return {
            f"{name}/{key}": value
            for name, state in self.states.items()
            for key, value in state.items()
            if isinstance(value, Tensor) and key not in QUANT_MAPS
        }

    def state_scalars(self) -> dict[str, dict[str, int]]:
        """The states that are plain numbers, by parameter: JSON-ready."""
        return {
            name: {key: value for key, value in state.items() if not isinstance(value, Tensor)}
            for name, state in self.states.items()
        }

    def load_state(self, tensors: dict[str, Tensor], scalars: dict[str, dict[str, int]]) -> None:
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
        self.states = {name: dict(state) for name, state in scalars.items()}
        for path, value in tensors.items():
            name, _, key = path.rpartition("/")
            self.states[name][key] = value.to(known[name].device) if value.dim() else value
        self._attach_quant_maps()

    def _attach_quant_maps(self) -> None:
        for state in self.states.values():
            for key, source in QUANT_MAPS.items():
                if "absmax1" in state:
                    maps = self._library.name2qmap  # type: ignore[attr-defined]
                    maps[source] = maps[source].to(self._slot.device)
                    state[key] = maps[source]
