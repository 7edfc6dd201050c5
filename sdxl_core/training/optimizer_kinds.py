"""The libraries' optimizers by name, each made around one float32 slot (see optimizer.py)."""

from __future__ import annotations

from collections.abc import Mapping
from importlib import import_module
from typing import Any

import torch
from torch import nn

from sdxl_core.errors import ConfigError

# What each named optimizer is, and which of the three general parameters it takes.
NAMED: dict[str, tuple[str, frozenset[str]]] = {
    "adamw": ("torch.optim.AdamW", frozenset({"betas", "eps", "weight_decay"})),
    "adamw8bit": ("bitsandbytes.optim.AdamW8bit", frozenset({"betas", "eps", "weight_decay"})),
    "pagedadamw8bit": ("bitsandbytes.optim.PagedAdamW8bit", frozenset({"betas", "eps", "weight_decay"})),
    "lion8bit": ("bitsandbytes.optim.Lion8bit", frozenset({"weight_decay"})),
    "adafactor": ("transformers.optimization.Adafactor", frozenset({"weight_decay"})),
}
_DEFAULTS: dict[str, dict[str, Any]] = {
    "adamw": {"foreach": False},
    "adafactor": {"scale_parameter": False, "relative_step": False, "warmup_init": False},
}


def library_optimizer(
    kind: str, slot: nn.Parameter, *, general: Mapping[str, Any], arguments: Mapping[str, Any]
) -> torch.optim.Optimizer:
    """The library's optimizer over `slot`, at learning rate 0 for now.

    Args:   kind: a key of NAMED, or `module.Class` of any torch optimizer.
            general: betas, eps, weight_decay; a `module.Class` gets its `arguments` only.
    Raises: ConfigError: no such class, arguments it does not take, or a class that cannot step alone.
    """
    path, takes = NAMED.get(kind, (kind, frozenset[str]()))
    if kind == "pagedadamw8bit" and slot.device.type == "cpu":
        path = NAMED["adamw8bit"][0]  # paging is where states lie, not what they are; on the CPU there is one memory
    found = _class(kind, path)
    values = _DEFAULTS.get(kind, {}) | {key: general[key] for key in sorted(takes)} | _tuples(arguments)
    try:
        if kind not in NAMED:
            _try_once(found, values)
        optimizer: torch.optim.Optimizer = found([slot], lr=0.0, **values)
    except (TypeError, ValueError, AssertionError, NotImplementedError, AttributeError, RuntimeError) as error:
        raise ConfigError(
            f"optimizer = {kind!r} with optimizer_args = {dict(arguments)}: {path} does not work with these: {error}. "
            f"It must take parameters, lr and these arguments, and step without a closure."
        ) from error
    if kind == "adafactor" and optimizer.param_groups[0]["relative_step"]:
        raise ConfigError(
            "optimizer_args: relative_step makes Adafactor find a rate of its own and ignore learning_rate, block_lr "
            "and lr_scheduler. Leave it out; learning_rate then counts."
        )
    return optimizer


def optimizer_warning(kind: str, arguments: Mapping[str, Any]) -> str | None:
    """What should be said about a `module.Class` before a run: it is stepped one parameter at a time, and never told

    that training is over. None where that changes nothing, and for the kinds of NAMED. Raises: as `library_optimizer`.
    """
    if kind in NAMED:
        return None
    optimizer = library_optimizer(kind, nn.Parameter(torch.zeros(1)), general={}, arguments=arguments)
    if hasattr(optimizer, "train") and hasattr(optimizer, "eval"):
        return (
            f"optimizer = {kind}: a schedule-free optimizer averages weights for use besides those that it trains. The "
            f"model will hold the trained ones; set ema_decay to have an average of them."
        )
    if {"d", "d0"} & optimizer.param_groups[0].keys():
        return (
            f"optimizer = {kind}: finds one rate from all parameters together. Here each parameter is stepped by "
            f"itself, so each finds a rate of its own: not what its authors measured."
        )
    return None


def _class(kind: str, path: str) -> Any:
    module, _, name = path.rpartition(".")
    try:
        found = getattr(import_module(module), name)
    except (ImportError, AttributeError) as error:
        raise ConfigError(
            f"optimizer = {kind!r}: there is no {path} here ({error}). Name one of {', '.join(NAMED)}, or "
            f"module.Class of an installed package."
        ) from error
    if not (isinstance(found, type) and issubclass(found, torch.optim.Optimizer)):
        raise ConfigError(f"optimizer = {kind!r}: {path} is not a subclass of torch.optim.Optimizer.")
    return found


def _try_once(found: Any, values: Mapping[str, Any]) -> None:
    trial = nn.Parameter(torch.ones(4, 4))
    trial.grad = torch.ones_like(trial)
    found([trial], lr=1e-3, **values).step()


def _tuples(arguments: Mapping[str, Any]) -> dict[str, Any]:
    """TOML has lists only; optimizers want tuples of betas."""
    return {key: tuple(value) if isinstance(value, list) else value for key, value in arguments.items()}
