"""What a run needs, from shapes alone: at full size, where libraries' 32-bit counters and 24 GB cards are."""

import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from sdxl_core.cli import main
from sdxl_core.config import TrainOptions
from sdxl_core.errors import ConfigError
from sdxl_core.models.load import meta_module
from sdxl_core.models.presets import Preset
from sdxl_core.training.memory_plan import LIMIT_ELEMENTS, check_card, disk_needs, most_disk_needs, plan_memory
from sdxl_core.training.optimizer import MIN_8BIT_ELEMENTS
from sdxl_core.training.parallel import piece_of_shape

GIB = 2**30
SIZE = {"width_px": 1024, "height_px": 1024}
EVERYTHING: dict[str, Any] = {"learning_rate_te1": 1e-6, "learning_rate_te2": 1e-6}


def test_8bit_states_are_decided_by_the_whole_tensor() -> None:
    """Divided among 4 processes, 104 of SDXL's tensors are small enough to change sides by their piece's size."""
    unet = list(meta_module("unet", "sdxl").parameters())
    assert sum(p.numel() for p in unet) == 2_567_463_684
    encoders = (meta_module(part, "sdxl") for part in ("text_encoder", "text_encoder_2"))
    parameters = [*unet, *(parameter for encoder in encoders for parameter in encoder.parameters())]
    pieces = [piece_of_shape(tuple(p.shape), rank=0, num_ranks=4) for p in parameters]
    flipping = [piece for piece in pieces if piece.total >= MIN_8BIT_ELEMENTS > piece.count]
    assert len(flipping) == 104


@pytest.mark.parametrize("shape", [(7, 3), (8,), (1, 5, 5), (2, 2), (16, 4, 3, 3)])
@pytest.mark.parametrize("num_ranks", [1, 2, 3, 4, 8])
def test_pieces_are_those_of_torch_chunk(shape: tuple[int, ...], num_ranks: int) -> None:
    whole = torch.arange(int(torch.tensor(shape).prod())).view(shape)
    chunks = list(torch.chunk(whole, num_ranks)) + [whole[:0]] * num_ranks
    for rank in range(num_ranks):
        piece = piece_of_shape(shape, rank=rank, num_ranks=num_ranks)
        assert torch.equal(whole.flatten()[piece.offset : piece.offset + piece.count], chunks[rank].flatten())


def test_full_sdxl_fits_24_gb_on_one_card_and_on_four() -> None:
    one = plan_memory(TrainOptions(fused_backward=True, **EVERYTHING), "sdxl", **SIZE)
    assert one.card_bytes < 24 * GIB and one.largest_buffer < LIMIT_ELEMENTS
    assert one.card["weights: U-Net"] == 2 * 2_567_463_684
    four = plan_memory(TrainOptions(num_processes=4, parallel="fsdp", **EVERYTHING), "sdxl", **SIZE)
    assert four.card_bytes < one.card_bytes and four.largest_buffer < LIMIT_ELEMENTS
    assert four.card["gradients"] > one.card["gradients"]
    assert one.num_trained == four.num_trained > 3_300_000_000
    accumulating = plan_memory(TrainOptions(gradient_accumulation_steps=2, **EVERYTHING), "sdxl", **SIZE)
    counted = ("weights: U-Net", "weights: text encoders", "gradients", "optimizer states")
    assert 20.2e9 < sum(accumulating.card[name] for name in counted) < 20.6e9, "20.3 GB before activations"


def test_what_cannot_fit_is_refused_with_the_cheapest_change() -> None:
    large = TrainOptions(learning_rate_te1=1e-6, gradient_checkpointing="none")
    with pytest.raises(ConfigError, match=r"fits: fused_backward = true \(20\.[5-9]\d GiB\)"):  # costs no speed
        check_card(large, "sdxl", card_bytes=24 * GIB, **SIZE)
    larger = large.model_copy(update={"fused_backward": True, "train_batch_size": 2})
    with pytest.raises(ConfigError, match=r'fits: gradient_checkpointing = "blocks" \(1[0-7]\.\d\d GiB\)'):
        check_card(larger, "sdxl", card_bytes=24 * GIB, **SIZE)
    small = TrainOptions(base_model="tiny", gradient_checkpointing="none", optimizer="adamw", train_batch_size=8)
    with pytest.raises(ConfigError, match="No change of settings makes it fit"):
        check_card(small, "tiny", card_bytes=GIB // 2, **SIZE)
    needed = plan_memory(small, "tiny", **SIZE).card_bytes
    with pytest.raises(ConfigError, match=r"fits: cache_text_encoder_outputs = true \("):
        check_card(small, "tiny", card_bytes=needed - 1, **SIZE)


def test_checkpointing_keeps_less_and_batches_keep_more() -> None:
    def activations(**changes: Any) -> int:
        plan = plan_memory(TrainOptions(base_model="tiny", **changes), "tiny", width_px=256, height_px=256)
        return plan.card["activations (estimate)"]

    kept = [activations(gradient_checkpointing=mode) for mode in ("none", "blocks", "all")]
    assert kept[0] > kept[1] > kept[2] > 0
    assert 3.9 < activations(train_batch_size=4, gradient_checkpointing="none") / kept[0] <= 4.0


def test_the_disk_needed_is_what_a_state_takes(tmp_path: Path) -> None:
    state, model = disk_needs(TrainOptions(base_model="tiny"), "tiny")
    divided, _ = disk_needs(TrainOptions(base_model="tiny", num_processes=2, parallel="fsdp"), "tiny")
    numel = sum(parameter.numel() for parameter in meta_module("unet", "tiny").parameters())
    assert 4 * numel < state < 4.6 * numel, "bf16 weights and two 8-bit states, small ones in float32"
    assert state <= divided < 1.05 * state and model > 2 * numel


@pytest.mark.parametrize("preset", ["tiny", "sdxl"])
@pytest.mark.parametrize(
    "options",
    [
        {"learning_rate_te1": 1e-6, "ema_decay": 0.9},
        {"num_processes": 3, "parallel": "fsdp", "weights_rounding": "kahan"},
        {"optimizer": "adafactor", "weights_dtype": "float32"},
    ],
)
def test_the_disk_needed_is_known_from_the_table_of_tensors(preset: Preset, options: dict[str, Any]) -> None:
    """The same numbers; where weights are frozen not less."""
    asked = TrainOptions(base_model="tiny", learning_rate=1e-6, **options)
    (exact, model), (most, most_model) = disk_needs(asked, preset), most_disk_needs(asked, preset)
    assert most_model == model
    assert most == exact or (asked.learning_rate_te1 and exact < most < 1.1 * exact), "CLIP-L's last layer is unused"
    frozen = asked.model_copy(update={"freeze": ("unet.down_blocks.*",)})
    assert disk_needs(frozen, preset)[0] < most_disk_needs(frozen, preset)[0] == most


def test_the_table_of_tensors_is_read_without_diffusers() -> None:
    """It takes seconds to import, and the process that starts the trainer needs it for nothing else."""
    code = (
        "import sys; from sdxl_core.config import TrainOptions; import sdxl_core.training.disk_guard as guard; "
        "print(guard.most_disk_needs(TrainOptions(base_model='tiny'), 'sdxl')); sys.exit('diffusers' in sys.modules)"
    )
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert ended.returncode == 0 and "6937675734" in ended.stdout, ended.stderr


def test_the_plan_command(capsys: pytest.CaptureFixture[str]) -> None:
    main(["plan", "--set", "fused_backward=true", "--set", "base_model=tiny", "--card-gb", "24"])
    printed = capsys.readouterr().out
    assert "optimizer states" in printed and "together" in printed and "parameters train" in printed
    with pytest.raises(SystemExit) as left:
        main(["plan", "--set", "base_model=tiny", "--card-gb", "0.1"])
    assert left.value.code == 2
    assert re.search(r"needs \d\.\d\d GiB of a card's 0\.10 GiB", capsys.readouterr().err)


def test_a_plan_says_whether_it_fits_or_what_to_ask_for(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    main(["plan", "--preset", "tiny", "--card-gb", "24"])
    assert re.search(r"\nit fits a card of 24\.00 GiB, 2\d\.\d\d GiB are left\n", capsys.readouterr().out)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 0)
    main(["plan", "--preset", "tiny"])
    assert "no card to hold it against here: --card-gb 24" in capsys.readouterr().out
    monkeypatch.setattr("torch.cuda.device_count", lambda: 2)
    sizes = [SimpleNamespace(total_memory=80 * GIB), SimpleNamespace(total_memory=16 * GIB)]
    monkeypatch.setattr("torch.cuda.get_device_properties", sizes.__getitem__)
    main(["plan", "--preset", "tiny"])
    assert "it fits a card of 16.00 GiB" in capsys.readouterr().out, "the smallest of this machine's"


def test_a_plan_without_a_base_model_is_sdxls(capsys: pytest.CaptureFixture[str]) -> None:
    main(["plan", "--preset", "24gb-single", "--card-gb", "24"])
    told = capsys.readouterr()
    assert "3,378,094,596 of 3,385,184,004 parameters train" in told.out
    assert "planned for SDXL" in told.err
    main(["plan", "--preset", "tiny"])
    assert not capsys.readouterr().err
