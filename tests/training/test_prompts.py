"""Preview prompts with sd-scripts' options."""

from collections.abc import Callable
from pathlib import Path

import pytest

from sdxl_core.config import TrainConfig
from sdxl_core.errors import ConfigError
from sdxl_core.training.previews import preview_paths, preview_steps
from sdxl_core.training.prompts import Prompt, prompts_of

Configure = Callable[..., TrainConfig]


def test_options_behind_a_prompt_win_over_the_config(config: Configure) -> None:
    run = config(
        sample_prompts=["a boat -- at sea --n lowres, bad --w 832 --h 1216 --d 7 --l 5.5 --s 28", "plain"], seed=3
    )
    first, second = prompts_of(run)
    assert first == Prompt(
        text="a boat -- at sea", negative="lowres, bad", width_px=832, height_px=1216, seed=7, guidance_scale=5.5,
        num_steps=28,
    )  # fmt: skip
    assert second == Prompt(
        text="plain", negative="", width_px=1024, height_px=1024, seed=3, guidance_scale=7.5, num_steps=20
    )


def test_a_file_has_a_prompt_a_line(config: Configure, tmp_path: Path) -> None:
    (tmp_path / "prompts.txt").write_text("# for the last epochs\n\n1girl --n --d 5\n  the sea  \n", "utf-8-sig")
    run = config(sample_prompts=["first"], sample_prompts_file=tmp_path / "prompts.txt")
    assert [(prompt.text, prompt.negative, prompt.seed) for prompt in prompts_of(run)] == [
        ("first", "", 0), ("1girl", "", 5), ("the sea", "", 0),
    ]  # fmt: skip
    assert [path.name for path in preview_paths(run, 40)][1] == "last_000040_01_5.png"


@pytest.mark.parametrize(
    ("prompt", "words"),
    [
        ("a --q 3", "prompt 1: there is no option --q; there are --n"),
        ("a --w wide", "--w 'wide' is not a number"),
        ("a --w 100", "multiples of 8"),
        ("a --s 0", "steps 1 to 1000"),
    ],
)
def test_a_prompt_that_cannot_be_right_is_named(config: Configure, prompt: str, words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        prompts_of(config(sample_prompts=[prompt]))
    with pytest.raises(ConfigError, match=r"sample_prompts_file = .* cannot be read"):
        prompts_of(config(sample_prompts_file="/nowhere/prompts.txt"))


def test_previews_come_by_steps_by_epochs_at_first_and_at_the_end(config: Configure) -> None:
    def steps(**changes: object) -> list[int]:
        return preview_steps(config(sample_prompts=["a"], **changes), 10, steps_per_epoch=4)

    assert steps() == [10]
    assert steps(sample_every_steps=3) == [3, 6, 9, 10]
    assert steps(sample_every_epochs=1, sample_at_first=True) == [0, 4, 8, 10]
    assert preview_steps(config(), 10, steps_per_epoch=4) == []
