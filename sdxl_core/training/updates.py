"""Gradients into weights: all at once after the backward pass, or each as soon as it is there (fused)."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
import torch.distributed as dist
from torch import Tensor, nn

from sdxl_core.training.optimizer import ParameterGroup, Shard, SlotOptimizer, clip_factor, share_of
from sdxl_core.training.parallel import local, piece_of


class Updater:
    """Steps `optimizer` on what this process holds of each parameter of `groups`."""

    def __init__(
        self,
        optimizer: SlotOptimizer,
        groups: tuple[ParameterGroup, ...],
        *,
        max_grad_norm: float,
        lr_factor: Callable[[int], float],
    ) -> None:
        self.optimizer, self.groups = optimizer, groups
        self._max_norm, self._lr_factor = max_grad_norm, lr_factor
        self.pieces = {name: piece_of(parameter) for _, name, parameter in self.walk()}
        self._divided = any(local(parameter) is not parameter for _, _, parameter in self.walk())
        self._is_rounded = any(parameter.dtype == torch.bfloat16 for _, _, parameter in self.walk())
        self._norms: list[Tensor] = []

    def walk(self) -> Iterator[tuple[ParameterGroup, str, nn.Parameter]]:
        """Every trained parameter with its group and name, in an order that is always the same."""
        for group in self.groups:
            for name, parameter in zip(group.names, group.parameters, strict=True):
                yield group, name, parameter

    def discard(self) -> None:
        """Forget the gradients."""
        for _, _, parameter in self.walk():
            parameter.grad = None

    def apply(self, step: int, norm: Tensor) -> float | None:
        """Optimizer step `step` with the gradients that are there, clipped by their joint `norm`, then freed.

        Returns the share of the computed update that reached bf16 weights, None for float32 ones.
        """
        factor = clip_factor(norm, max_norm=self._max_norm)
        self.optimizer.begin(step=step, lr_factor=self._lr_factor(step))
        for group, name, parameter in self.walk():
            gradient, parameter.grad = parameter.grad, None
            if gradient is not None and self.pieces[name].count:
                self._update(group, name, parameter, local(gradient), factor)
        return self._share()

    def fuse(self) -> None:
        """From now on each backward pass updates weights; `begin` goes before it, `end` after it."""
        for group, name, parameter in self.walk():
            parameter.register_post_accumulate_grad_hook(self._hook(group, name))  # type: ignore[no-untyped-call]

    def begin(self, step: int) -> None:
        """Before the backward pass of optimizer step `step`."""
        self._norms = []
        self.optimizer.begin(step=step, lr_factor=self._lr_factor(step))

    def end(self) -> tuple[Tensor, float | None]:
        """After it: the joint norm of all gradients, and the share as `apply` returns it.

        A norm that is not finite: what was not finite has moved no weight, the rest has.
        """
        return torch.linalg.vector_norm(torch.stack(self._norms)), self._share()

    def _hook(self, group: ParameterGroup, name: str) -> Callable[[Tensor], None]:
        @torch.no_grad()
        def update(parameter: Tensor) -> None:
            gradient, parameter.grad = parameter.grad, None
            assert gradient is not None
            norm = torch.linalg.vector_norm(gradient, dtype=torch.float32)
            self._norms.append(norm)
            factor = torch.where(norm.isfinite(), clip_factor(norm, max_norm=self._max_norm), 0.0)
            gradient.nan_to_num_(nan=0.0, posinf=0.0, neginf=0.0)  # no waiting for the card to know whether it must
            self._update(group, name, parameter, gradient, factor)

        return update

    def _update(self, group: ParameterGroup, name: str, parameter: Tensor, gradient: Tensor, factor: Tensor) -> None:
        piece = self.pieces[name]
        self.optimizer.step_parameter(
            group, name, local(parameter.detach()), gradient,
            grad_factor=factor, shard=Shard(start=piece.offset, num_elements=piece.total),
        )  # fmt: skip

    def _share(self) -> float | None:
        sums = self.optimizer.finish()
        if not self._is_rounded:
            return None
        if sums is None:  # nothing of what trains is held here
            sums = torch.zeros(2, device=next(self.walk())[2].device)
        if self._divided:
            dist.all_reduce(sums)
        return share_of(sums)
