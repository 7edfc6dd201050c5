"""Presets are valid, and lie under what a file says."""

from __future__ import annotations

from pathlib import Path

import pytest

from sdxl_core.cli import main
from sdxl_core.config import JobConfig, TrainConfig
from sdxl_core.configfile import check
from sdxl_core.errors import ConfigError
from sdxl_core.presets import presets, read_preset, under_job, under_training


@pytest.mark.parametrize("name", [preset.name for preset in presets()])
def test_every_preset_is_a_valid_job_and_training(name: str, tmp_path: Path) -> None:
    assert set(read_preset(name)) <= {"latents", "train"}
    job = check(JobConfig, under_job(name, {"out": "o", "source": {"path": "s"}}), where=name)
    values = under_training(name, {"metadata": "m", "latents": "l", "out": "o"})
    config = check(TrainConfig, values, where=name)
    assert config.train_batch_size == job.train.train_batch_size


def test_the_four_presets_are_there() -> None:
    assert {preset.name for preset in presets()} == {"animagine-xl-3.1", "24gb-single", "4x24gb", "tiny"}
    assert all(len(preset.about) > 30 for preset in presets())


def test_a_file_wins_over_its_preset() -> None:
    job = under_job("tiny", {"out": "o", "source": {"path": "s"}, "train": {"max_train_steps": 3}})
    assert (job["train"]["max_train_steps"], job["train"]["base_model"]) == (3, "tiny")
    assert under_training("tiny", {"learning_rate": 1.0})["learning_rate"] == 1.0
    assert under_training(None, {"seed": 1}) == {"seed": 1}
    assert read_preset("tiny")["train"]["max_train_steps"] == 40, "presets themselves do not change"


def test_an_unknown_preset_names_those_there_are() -> None:
    with pytest.raises(ConfigError, match=r"there is no such preset\. There are 24gb-single"):
        read_preset("48gb")


@pytest.mark.parametrize("preset", ["24gb-single", "4x24gb"])
def test_the_presets_for_24_gb_fit_by_the_plan(preset: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """SDXL in full: the plan is made from shapes, a job file or nothing beside the preset."""
    job = tmp_path / "job.toml"
    job.write_text('out = "o"\nsource.path = "s"\n[train]\nbase_model = "sdxl.safetensors"\n')
    main(["plan", str(job), "--preset", preset, "--card-gb", "24"])
    of_job = capsys.readouterr().out
    main(["plan", "--preset", preset, "--set", "base_model=sdxl.safetensors", "--card-gb", "24"])
    assert capsys.readouterr().out == of_job and "3,378,094,596 of 3,385,184,004 parameters train" in of_job


def test_the_example_of_a_real_model_fits_its_card(capsys: pytest.CaptureFixture[str]) -> None:
    example = Path(__file__).parents[2] / "examples" / "24gb.toml"
    main(["plan", str(example), "--preset", "24gb-single", "--card-gb", "24"])
    assert "3,378,094,596 of 3,385,184,004 parameters train" in capsys.readouterr().out


def test_presets_are_listed_and_printed(capsys: pytest.CaptureFixture[str]) -> None:
    main(["presets"])
    assert "4x24gb" in capsys.readouterr().out
    main(["presets", "tiny"])
    assert 'base_model = "tiny"' in capsys.readouterr().out
