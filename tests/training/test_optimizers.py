"""Every optimizer around the slot is its library's own step; block rates; what is refused."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from sdxl_core.config import TrainOptions
from sdxl_core.errors import ConfigError
from sdxl_core.models import load_models
from sdxl_core.training.optimizer import ParameterGroup, Rounding, Shard, SlotOptimizer, share_of
from sdxl_core.training.optimizer_kinds import NAMED, optimizer_warning
from sdxl_core.training.rates import block_of, freeze_blocks, parameter_groups
from sdxl_core.training.rounding import split_into, with_rest

SHAPES = ((80, 90), (7,), (64, 64))
RATE = 1e-3


def parameters(dtype: torch.dtype = torch.float32) -> list[nn.Parameter]:
    generator = torch.Generator().manual_seed(3)
    return [nn.Parameter(torch.randn(shape, generator=generator).to(dtype)) for shape in SHAPES]


def gradients(step: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(step)
    return [torch.randn(shape, generator=generator) for shape in SHAPES]


def group_of(members: list[nn.Parameter]) -> ParameterGroup:
    names = tuple(f"unet.p{i}" for i in range(len(members)))
    return ParameterGroup(name="unet", names=names, parameters=tuple(members), learning_rate=RATE)


def slot_optimizer(group: ParameterGroup, kind: str, **more: Any) -> SlotOptimizer:
    values: dict[str, Any] = {"betas": (0.8, 0.99), "eps": 1e-8, "weight_decay": 0.02, "seed": 0}
    return SlotOptimizer([group], kind=kind, **values | more)


def adamw(members: list[nn.Parameter]) -> torch.optim.Optimizer:
    return torch.optim.AdamW(members, lr=RATE, betas=(0.8, 0.99), weight_decay=0.02)


def adamw8bit(members: list[nn.Parameter]) -> Any:
    import bitsandbytes

    return bitsandbytes.optim.AdamW8bit(members, lr=RATE, betas=(0.8, 0.99), weight_decay=0.02)


def lion8bit(members: list[nn.Parameter]) -> Any:
    import bitsandbytes

    return bitsandbytes.optim.Lion8bit(members, lr=RATE, weight_decay=0.02)


def adafactor(members: list[nn.Parameter]) -> Any:
    from transformers.optimization import Adafactor

    return Adafactor(members, lr=RATE, weight_decay=0.02, scale_parameter=False, relative_step=False)


def radam(members: list[nn.Parameter]) -> torch.optim.Optimizer:
    return torch.optim.RAdam(members, lr=RATE, betas=(0.7, 0.9))


@pytest.mark.parametrize(
    ("kind", "library", "arguments"),
    [
        ("adamw", adamw, {}),
        ("adamw8bit", adamw8bit, {}),
        ("pagedadamw8bit", adamw8bit, {}),  # on the CPU; paging changes where states lie, no number
        ("lion8bit", lion8bit, {}),
        ("adafactor", adafactor, {}),
        ("torch.optim.RAdam", radam, {"betas": [0.7, 0.9]}),
    ],
)
def test_a_step_is_the_librarys_own_in_any_order_and_after_a_restart(
    kind: str, library: Callable[..., torch.optim.Optimizer], arguments: dict[str, Any]
) -> None:
    ours, theirs = parameters(), parameters()
    group, reference = group_of(ours), library(theirs)
    slot = slot_optimizer(group, kind, arguments=arguments)
    for step in range(5):
        if step == 3:  # a state that went through files continues exactly
            saved = {name: value.clone() for name, value in slot.state_tensors().items()}
            scalars = slot.state_scalars()
            slot = slot_optimizer(group, kind, arguments=arguments)
            slot.load_state(saved, scalars)
        slot.begin(step=step, lr_factor=1.0)
        for i, gradient in reversed(list(enumerate(gradients(step)))):  # as a backward pass delivers them
            slot.step_parameter(group, group.names[i], ours[i], gradient)
        assert slot.finish() is None
        for parameter, gradient in zip(theirs, gradients(step), strict=True):
            parameter.grad = gradient
        reference.step()
    for a, b in zip(ours, theirs, strict=True):
        assert torch.equal(a, b)


def test_an_optimizer_with_numbers_of_its_own_keeps_them_for_each_parameter() -> None:
    """Such as a step count in the parameter group, which schedule-free optimizers have."""
    group = group_of(parameters())
    slot = slot_optimizer(group, f"{__name__}.CountingSGD")
    for step in range(3):
        slot.begin(step=step, lr_factor=1.0)
        for name, parameter, gradient in zip(group.names, group.parameters, gradients(step), strict=True):
            slot.step_parameter(group, name, parameter, gradient)
    assert {name: state["options"] for name, state in slot.state_scalars().items()} == {
        name: {"count": 3} for name in group.names
    }


@pytest.mark.filterwarnings("ignore:Paged optimizers are not supported on CPU")
def test_states_come_back_into_the_pages_of_a_paged_optimizer() -> None:
    """Without a card bitsandbytes' pages are plain memory; that they are asked for, once, can be seen all the same."""
    group = group_of(parameters())
    slot = slot_optimizer(group, "bitsandbytes.optim.PagedAdamW8bit")
    asked: list[tuple[int, ...]] = []
    library: Any = slot._library
    buffer = library.get_state_buffer
    library.get_state_buffer = lambda p, dtype: (asked.append(tuple(p.shape)), buffer(p, dtype=dtype))[1]
    for name, parameter, gradient in zip(group.names, group.parameters, gradients(0), strict=True):
        slot.step_parameter(group, name, parameter, gradient)
    saved = {name: value.clone() for name, value in slot.state_tensors().items()}
    pages = slot.states[group.names[0]]["state1"].data_ptr()
    asked.clear()
    slot.load_state(saved, slot.state_scalars())
    assert not asked and slot.states[group.names[0]]["state1"].data_ptr() == pages
    again = slot_optimizer(group, "bitsandbytes.optim.PagedAdamW8bit")
    again.load_state(saved, slot.state_scalars())
    assert all(torch.equal(value, saved[name]) for name, value in again.state_tensors().items())


class CountingSGD(torch.optim.SGD):
    def __init__(self, params: Any, lr: float) -> None:
        super().__init__(params, lr=lr)
        self.param_groups[0]["count"] = 0

    def step(self, closure: Any = None) -> None:
        self.param_groups[0]["count"] += 1
        super().step()


class ScheduleFree(CountingSGD):
    """With the two modes that schedule-free optimizers have."""

    def train(self) -> None: ...

    def eval(self) -> None: ...


class OneRateForAll(CountingSGD):
    """With the estimate that Prodigy and D-Adaptation keep in their parameter group."""

    def __init__(self, params: Any, lr: float) -> None:
        super().__init__(params, lr)
        self.param_groups[0]["d"] = 1e-6


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        (f"{__name__}.ScheduleFree", "set ema_decay"), (f"{__name__}.OneRateForAll", "a rate of its own"),
        (f"{__name__}.CountingSGD", None), ("torch.optim.RAdam", None), ("adamw8bit", None),
    ],
)  # fmt: skip
def test_what_an_optimizer_loses_here_is_said_before_the_run(kind: str, message: str | None) -> None:
    warning = optimizer_warning(kind, {})
    assert warning is None if message is None else message in str(warning)


class Hoarder(torch.optim.SGD):
    """Keeps in its state what cannot be saved."""

    def step(self, closure: Any = None) -> None:
        for parameter in self.param_groups[0]["params"]:
            self.state[parameter]["history"] = [1, 2]


@pytest.mark.parametrize(
    ("kind", "arguments", "message"),
    [
        ("torch.optim.Nothing", {}, "there is no torch.optim.Nothing here.*Name one of adamw,"),
        ("nowhere.Adam", {}, "there is no nowhere.Adam here"),
        ("torch.nn.Linear", {}, "not a subclass of torch.optim.Optimizer"),
        ("torch.optim.RAdam", {"bettas": 1}, "torch.optim.RAdam does not work with these: .*bettas"),
        ("torch.optim.LBFGS", {}, "step without a closure"),
        ("adamw", {"nonsense": 1}, "does not work with these"),
        ("adafactor", {"relative_step": True}, "find a rate of its own|does not work"),
    ],
)
def test_an_optimizer_that_cannot_be_used_is_refused(kind: str, arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        slot_optimizer(group_of(parameters()), kind, arguments=arguments)


def test_a_state_that_cannot_be_saved_is_refused_at_the_first_step() -> None:
    group = group_of(parameters())
    slot = slot_optimizer(group, f"{__name__}.Hoarder")
    slot.begin(step=0, lr_factor=1.0)
    with pytest.raises(ConfigError, match="Hoarder keeps history in its state"):
        slot.step_parameter(group, group.names[0], group.parameters[0], gradients(0)[0])


@pytest.mark.parametrize(("given", "name"), [("AdamW8bit", "adamw8bit"), ("PagedAdamW8bit", "pagedadamw8bit")])
def test_names_are_read_as_sd_scripts_spells_them(given: str, name: str) -> None:
    assert TrainOptions(optimizer=given).optimizer == name and name in NAMED
    with pytest.raises(ValueError, match="no optimizer of this name; choose adamw, "):
        TrainOptions(optimizer="adammw")


@pytest.mark.parametrize("rounding", ["stochastic", "kahan"])
@pytest.mark.parametrize("kind", ["adamw8bit", "lion8bit"])
def test_shards_step_as_the_whole_does(kind: str, rounding: Rounding) -> None:
    """In slices of whole 256-element blocks, as two processes hold them: the same bits."""
    whole, parts = parameters(torch.bfloat16)[2], parameters(torch.bfloat16)[2]
    one, two = group_of([whole]), group_of([parts])
    slot = slot_optimizer(one, kind, rounding=rounding)
    shards = [slot_optimizer(two, kind, rounding=rounding) for _ in range(2)]
    for step in range(3):
        gradient = gradients(step)[2]
        slot.begin(step=step, lr_factor=1.0)
        slot.step_parameter(one, "unet.p0", whole, gradient)
        expected = slot.finish()
        sums = torch.zeros(2)
        for number, optimizer in enumerate(shards):
            optimizer.begin(step=step, lr_factor=1.0)
            rows = slice(32 * number, 32 * (number + 1))
            place = Shard(start=32 * number * 64, num_elements=parts.numel())
            optimizer.step_parameter(two, "unet.p0", parts.data[rows], gradient[rows], shard=place)
            part = optimizer.finish()
            assert part is not None
            sums += part
        assert expected is not None and share_of(sums) == pytest.approx(share_of(expected), rel=1e-3)
    assert torch.equal(whole, parts)
    small = shards[0].states["unet.p0"]["state1"]
    assert small.dtype == torch.uint8, "2048 elements, but 4096 in the whole parameter: 8-bit states"


def test_a_rest_and_its_weight_are_the_float32_weight() -> None:
    generator = torch.Generator().manual_seed(0)
    values = torch.cat([torch.randn(10_000, generator=generator), torch.tensor([0.0, -0.0, 1.0, 2**-130, -3e38])])
    target, rest = torch.empty_like(values, dtype=torch.bfloat16), torch.empty_like(values, dtype=torch.int16)
    split_into(target, rest, values.clone())
    assert torch.equal(with_rest(target, rest), values)
    assert ((target.float() - values).abs() <= values.abs() * 2**-8).all(), "rounded to nearest"


def test_compensated_bf16_weights_follow_float32_weights_to_the_bit() -> None:
    exact = [nn.Parameter(p.detach().float()) for p in parameters(torch.bfloat16)]
    half = parameters(torch.bfloat16)
    one, two = group_of(exact), group_of(half)
    full, kahan = slot_optimizer(one, "adamw"), slot_optimizer(two, "adamw", rounding="kahan")
    for step in range(6):
        if step == 3:
            saved, scalars = {k: v.clone() for k, v in kahan.state_tensors().items()}, kahan.state_scalars()
            kahan = slot_optimizer(two, "adamw", rounding="kahan")
            kahan.load_state(saved, scalars)
        full.begin(step=step, lr_factor=1e-3)
        kahan.begin(step=step, lr_factor=1e-3)
        for i, gradient in enumerate(gradients(step)):
            full.step_parameter(one, one.names[i], exact[i], gradient.clone())
            kahan.step_parameter(two, two.names[i], half[i], gradient.clone())
        sums = kahan.finish()
        assert sums is not None and share_of(sums) == pytest.approx(1.0, rel=1e-6)
    for name, bf16, fp32 in zip(two.names, half, exact, strict=True):
        assert torch.equal(with_rest(bf16.data, kahan.rests[name]), fp32)


def test_block_rates_cover_the_unet_as_sd_scripts_counts_blocks() -> None:
    with torch.device("meta"):
        from sdxl_core.models.load import _new_module

        names = [name for name, _ in _new_module("unet", "sdxl").named_parameters()]
    blocks = {name: block_of(name, "sdxl") for name in names}
    assert set(blocks.values()) == set(range(23))
    assert blocks["time_embedding.linear_1.weight"] == blocks["add_embedding.linear_2.bias"] == 0
    assert blocks["conv_in.weight"] == 1 and blocks["down_blocks.0.downsamplers.0.conv.weight"] == 4
    assert blocks["mid_block.attentions.0.norm.weight"] == 11
    assert blocks["up_blocks.2.resnets.2.conv1.weight"] == 21
    assert blocks["conv_norm_out.weight"] == blocks["conv_out.bias"] == 22


def test_blocks_have_their_rate_or_are_frozen() -> None:
    rates = tuple(0.0 if block in (0, 5) else 1e-6 * block for block in range(23))
    options = TrainOptions(block_lr=rates, learning_rate_te1=2e-6)
    models = load_models("tiny", parts=("unet", "text_encoder", "text_encoder_2"), dtype=torch.float32)
    modules = {"unet": models.unet, "text_encoder": models.text_encoder, "text_encoder_2": models.text_encoder_2}
    freeze_blocks(models.unet, options, "tiny")
    groups = parameter_groups(modules, options, "tiny")
    assert [group.name for group in groups] == [
        *(f"block{block}" for block in range(1, 23) if block != 5), "text_encoder1",
    ]  # fmt: skip
    assert all(group.learning_rate == rates[int(group.name[5:])] for group in groups[:-1])
    trained = {name for group in groups[:-1] for name in group.names}
    frozen = {f"unet.{name}" for name, p in models.unet.named_parameters() if not p.requires_grad}
    assert trained | frozen == {f"unet.{name}" for name, _ in models.unet.named_parameters()}
    assert frozen and not trained & frozen


def test_a_rate_list_of_the_wrong_length_says_what_is_needed() -> None:
    with pytest.raises(ValueError, match=r"these are 3 rates; 23 in \[0, 1\] are needed"):
        TrainOptions(block_lr=(1e-5, 1e-5, 1e-5))
    with pytest.raises(ValueError, match="nothing would train"):
        TrainOptions(block_lr=(0.0,) * 23)
