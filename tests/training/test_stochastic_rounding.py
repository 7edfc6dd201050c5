"""bf16 weights that move: the rounding itself, and AdamW around it at SDXL's smallest usual learning rate."""

from typing import Literal

import pytest
import torch
from torch import Tensor, nn

from sdxl_core.training import rounding
from sdxl_core.training.optimizer import ParameterGroup, SlotOptimizer, clip_factor
from sdxl_core.training.parallel import gradient_norm
from sdxl_core.training.rounding import RoundingNoise, random_16_bits, round_into
from sdxl_core.training.updates import Updater

CPU = torch.device("cpu")
LEARNING_RATE = 4e-7
Kind = Literal["adamw", "adamw8bit"]


def rounded(values: Tensor, *, key: int, position: int = 0) -> Tensor:
    target = torch.empty_like(values, dtype=torch.bfloat16)
    round_into(target, values.clone(), RoundingNoise(key=key, device=CPU), position=position)
    return target.float()


def test_rounding_goes_to_a_neighbour_and_is_right_on_average() -> None:
    values = torch.randn(64, generator=torch.Generator().manual_seed(0)).repeat(4096, 1)
    result = rounded(values, key=12345)
    gap = (values.bfloat16().float().abs() * 2**-7).clamp(min=1e-30)
    assert ((result - values).abs() < gap).all()
    bias = (result - values).mean(dim=0) / gap[0]
    assert bias.abs().max() < 0.04  # 4.5 standard errors of 4096 draws


@pytest.mark.parametrize("value", [0.0, -0.0, 1.0, -2.5, 3.3895313892515355e38, float("inf"), float("-inf")])
def test_what_bf16_can_hold_stays_exactly(value: float) -> None:
    assert torch.equal(rounded(torch.full((100,), value), key=1), torch.full((100,), value))


def test_nan_stays_nan() -> None:
    assert rounded(torch.full((100,), float("nan")), key=1).isnan().all()


def test_the_noise_of_an_element_depends_on_its_position_only(monkeypatch: pytest.MonkeyPatch) -> None:
    values = torch.randn(3001, generator=torch.Generator().manual_seed(1))
    whole = rounded(values, key=99)
    monkeypatch.setitem(rounding.CHUNK_ELEMENTS, "cpu", 64)
    assert torch.equal(rounded(values, key=99), whole), "chunks do not show"
    parts = [rounded(values[start : start + 777], key=99, position=start) for start in range(0, 3001, 777)]
    assert torch.equal(torch.cat(parts), whole), "a slice alone is rounded as in the whole"
    assert torch.equal(random_16_bits(500, start=1000, key=99, device=CPU),
                       random_16_bits(3001, start=0, key=99, device=CPU)[1000:1500])  # fmt: skip
    assert not torch.equal(rounded(values, key=100), whole)


@pytest.mark.parametrize("bit", [0, 1, 31, 32, 33, 63])
def test_noise_of_neighbouring_keys_is_uncorrelated(bit: int) -> None:
    one, other = (random_16_bits(1 << 18, start=0, key=key, device=CPU).double() for key in (7, 7 ^ (1 << bit)))
    assert abs(float(torch.corrcoef(torch.stack([one, other]))[0, 1])) < 0.01
    assert abs(float(one.mean()) / 32767.5 - 1) < 0.01


def gradient(step: int, shape: torch.Size, drift: Tensor) -> Tensor:
    noise = torch.randn(shape, generator=torch.Generator().manual_seed(step))
    return 1e-4 * (noise + drift)


def apply(slot: SlotOptimizer, step: int) -> float | None:
    """As the trainer does it, at the full rate and unclipped. Returns the update share."""
    updater = Updater(slot, slot.groups, max_grad_norm=0.0, lr_factor=lambda step: 1.0)
    return updater.apply(step, torch.tensor(0.0))


def displacement(dtype: torch.dtype, kind: Kind, *, steps: int, nearest: bool = False) -> tuple[Tensor, list[float]]:
    """How far `steps` steps move weights of SDXL's scale (std 0.03), and the update shares they reported."""
    generator = torch.Generator().manual_seed(0)
    start = (0.03 * torch.randn(96, 96, generator=generator)).bfloat16().float()
    drift = torch.randn(start.shape, generator=generator)
    weight = nn.Parameter(start.clone().to(dtype))
    if nearest:
        optimizer: torch.optim.Optimizer = torch.optim.AdamW([weight], lr=LEARNING_RATE)
        for step in range(steps):
            weight.grad = gradient(step, start.shape, drift).to(dtype)
            optimizer.step()
        return weight.detach().float() - start, []
    group = ParameterGroup(name="unet", names=("unet.w",), parameters=(weight,), learning_rate=LEARNING_RATE)
    slot = SlotOptimizer([group], kind=kind, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.01, seed=0)
    shares = []
    for step in range(steps):
        weight.grad = gradient(step, start.shape, drift).to(dtype)
        shares.append(apply(slot, step))
    assert weight.dtype == dtype and weight.grad is None
    return weight.detach().float() - start, [share for share in shares if share is not None]


def projection(moved: Tensor, wanted: Tensor) -> float:
    return float((moved * wanted).sum() / (wanted * wanted).sum())


@pytest.mark.parametrize("kind", ["adamw", "adamw8bit"])
def test_300_small_steps_reach_bf16_weights(kind: Kind) -> None:
    wanted, none = displacement(torch.float32, kind, steps=300)
    moved, shares = displacement(torch.bfloat16, kind, steps=300)
    assert 0.95 <= projection(moved, wanted) <= 1.05
    assert not none and 0.95 < sum(shares) / len(shares) < 1.05


def test_rounding_to_nearest_loses_them() -> None:
    """The reason for all this: the same steps in plain bf16."""
    wanted, _ = displacement(torch.float32, "adamw", steps=300)
    moved, _ = displacement(torch.bfloat16, "adamw", steps=300, nearest=True)
    assert projection(moved, wanted) < 0.1


def library_optimizer(kind: Kind, parameters: list[nn.Parameter]) -> torch.optim.Optimizer:
    if kind == "adamw":
        return torch.optim.AdamW(parameters, lr=1e-3, weight_decay=0.02, betas=(0.8, 0.99))
    import bitsandbytes

    optimizer: torch.optim.Optimizer = bitsandbytes.optim.AdamW8bit(
        parameters, lr=1e-3, weight_decay=0.02, betas=(0.8, 0.99)
    )
    return optimizer


@pytest.mark.parametrize("kind", ["adamw", "adamw8bit"])
def test_float32_steps_are_the_librarys_own(kind: Kind) -> None:
    def parameters() -> list[nn.Parameter]:
        generator = torch.Generator().manual_seed(3)
        return [nn.Parameter(torch.randn(shape, generator=generator)) for shape in ((80, 90), (7,), (64, 64))]

    ours, theirs = parameters(), parameters()
    names = ("unet.a", "unet.b", "unet.c")
    group = ParameterGroup(name="unet", names=names, parameters=tuple(ours), learning_rate=1e-3)
    slot = SlotOptimizer([group], kind=kind, betas=(0.8, 0.99), eps=1e-8, weight_decay=0.02, seed=0)
    library = library_optimizer(kind, theirs)
    for step in range(5):
        for i, (a, b) in enumerate(zip(ours, theirs, strict=True)):
            a.grad = gradient(10 * step + i, a.shape, torch.tensor(0.5))
            b.grad = a.grad.clone()
        if step == 3:  # a state that went through files continues exactly
            saved = {name: value.clone() for name, value in slot.state_tensors().items()}
            scalars = slot.state_scalars()
            slot = SlotOptimizer([group], kind=kind, betas=(0.8, 0.99), eps=1e-8, weight_decay=0.02, seed=0)
            slot.load_state(saved, scalars)
        apply(slot, step)
        library.step()
    for a, b in zip(ours, theirs, strict=True):
        assert torch.equal(a, b)


def test_clipping_is_torchs_joint_norm() -> None:
    parameters = [nn.Parameter(torch.zeros(shape)) for shape in ((30, 4), (5,))]
    for i, parameter in enumerate(parameters):
        parameter.grad = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(i))
    norm = gradient_norm(parameters)
    ours = [p.grad * clip_factor(norm, max_norm=1.0) for p in parameters if p.grad is not None]
    torch.testing.assert_close(norm, nn.utils.clip_grad_norm_(parameters, 1.0))
    torch.testing.assert_close(ours, [p.grad for p in parameters])
    assert clip_factor(norm, max_norm=0.0) == 1 and clip_factor(norm, max_norm=1e9) == 1
