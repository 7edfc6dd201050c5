"""1,000 steps at SDXL's official 4e-7 on weights of the tiny preset: bf16 weights move as float32 weights do."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from sdxl_core.models import load_models
from sdxl_core.training.optimizer import ParameterGroup, Rounding, SlotOptimizer

STEPS, RATE = 1_000, 4e-7
PARTS = ("unet", "text_encoder", "text_encoder_2")
MOST_ELEMENTS = 30_000
Weights = dict[str, dict[str, nn.Parameter]]


def weights(dtype: torch.dtype) -> Weights:
    """Of each part its two largest tensors (as much of them), a norm and a bias. All begin as bf16 numbers."""
    models = load_models("tiny", parts=PARTS, dtype=torch.bfloat16)
    chosen: Weights = {}
    for part in PARTS:
        named = dict(getattr(models, part).named_parameters())
        largest = sorted(named, key=lambda name: -named[name].numel())[:2]
        names = [*largest, *(next(name for name in named if kind in name) for kind in ("norm1.weight", ".bias"))]
        chosen[part] = {
            f"{part}.{name}": nn.Parameter(named[name].detach().flatten()[:MOST_ELEMENTS].to(dtype)) for name in names
        }
    return chosen


def gradients(start: Weights) -> Callable[[str, int], Tensor]:
    """Noise around a drift that each element keeps, 1e-4 in size: cheap, and the same for every run."""
    generator = torch.Generator().manual_seed(0)
    drift = {
        name: torch.randn(p.shape, generator=generator) for members in start.values() for name, p in members.items()
    }
    noise = torch.randn(MOST_ELEMENTS + 7 * STEPS, generator=generator)

    def gradient(name: str, step: int) -> Tensor:
        shift = drift[name]
        return 1e-4 * (noise[7 * step : 7 * step + shift.numel()].view(shift.shape) + shift)

    return gradient


def moved(final: Weights, before: Weights, part: str) -> Tensor:
    return torch.cat([(final[part][name].float() - p.float()).flatten() for name, p in before[part].items()]).detach()


def run(dtype: torch.dtype, rounding: Rounding) -> tuple[Weights, SlotOptimizer]:
    trained = weights(dtype)
    groups = [
        ParameterGroup(name=part, names=tuple(members), parameters=tuple(members.values()), learning_rate=RATE)
        for part, members in trained.items()
    ]
    optimizer = SlotOptimizer(
        groups, kind="adamw8bit", betas=(0.9, 0.999), eps=1e-8, weight_decay=0.01, seed=0, rounding=rounding
    )
    gradient = gradients(trained)
    for step in range(STEPS):
        optimizer.begin(step=step, lr_factor=1.0)
        for group in groups:
            for name, parameter in zip(group.names, group.parameters, strict=True):
                optimizer.step_parameter(group, name, parameter, gradient(name, step))
        optimizer.finish()
    return trained, optimizer


def projection(moved: Tensor, wanted: Tensor) -> float:
    return float(moved @ wanted / (wanted @ wanted))


@pytest.fixture(scope="module")
def exact() -> Weights:
    """The same 1,000 steps on float32 weights."""
    return run(torch.float32, "stochastic")[0]


def test_stochastic_rounding_follows_float32(exact: Weights) -> None:
    before, trained = weights(torch.bfloat16), run(torch.bfloat16, "stochastic")[0]
    for part in PARTS:
        share = projection(moved(trained, before, part), moved(exact, before, part))
        assert 0.98 <= share <= 1.02, part


def test_compensated_weights_are_float32s_to_the_bit(exact: Weights) -> None:
    from sdxl_core.training.rounding import with_rest

    trained, optimizer = run(torch.bfloat16, "kahan")
    for part in PARTS:
        for name, parameter in trained[part].items():
            assert torch.equal(with_rest(parameter.data, optimizer.rests[name]), exact[part][name]), name


def test_plain_bf16_loses_almost_all(exact: Weights) -> None:
    """bitsandbytes on bf16 weights, as --full_bf16 --use_8bit_adam has it."""
    import bitsandbytes

    before, trained = weights(torch.bfloat16), weights(torch.bfloat16)
    members = {name: p for part in PARTS for name, p in trained[part].items()}
    library = bitsandbytes.optim.AdamW8bit(list(members.values()), lr=RATE, weight_decay=0.01)
    gradient = gradients(trained)
    for step in range(0, STEPS, 10):  # a tenth of the steps: it is slow, and does not move
        for name, parameter in members.items():
            parameter.grad = gradient(name, step).bfloat16()
        library.step()
    for part in PARTS:
        wanted = moved(exact, before, part) / 10
        assert projection(moved(trained, before, part), wanted) < 0.1, part
