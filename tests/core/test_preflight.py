"""A job that cannot be right is refused before anything is read or made."""

from pathlib import Path
from typing import Any

import pytest

from sdxl_core.config import JobConfig
from sdxl_core.errors import CheckpointError, ConfigError
from sdxl_core.preflight import check_job


def job(folder: Path, **sections: Any) -> JobConfig:
    (folder / "in").mkdir(exist_ok=True)
    return JobConfig.model_validate({"out": folder / "out", "source": {"path": folder / "in"}} | sections)


def test_a_job_that_can_be_right_passes_and_makes_nothing(tmp_path: Path) -> None:
    check_job(job(tmp_path))
    assert [path.name for path in tmp_path.iterdir()] == ["in"]


@pytest.mark.parametrize(
    ("sections", "words"),
    [
        ({"source": {"path": "/nowhere/at/all"}}, r"source\.path = /nowhere/at/all: does not exist"),
        ({"source": {"path": __file__}}, r"source\.path = .*is a file"),
        ({"out": __file__}, r"out = .*this is a file"),
        ({"subset": {"query": '"open'}}, "quote"),
        ({"latents": {"vae": "no.safetensors"}}, r"latents\.vae = no\.safetensors: there is no such file"),
        ({"train": {"base_model": "no.safetensors"}}, r"train\.base_model = no\.safetensors"),
        ({"latents": {"devices": "77"}}, "no device '77'"),
        ({"train": {"sample_prompts": ["a --q 1"]}}, "prompt 1: there is no option --q"),
    ],
)
def test_what_cannot_be_right_is_named_by_its_key(tmp_path: Path, sections: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        check_job(job(tmp_path, **sections))


def test_a_base_model_that_is_none_is_told_before_pictures_are_read(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"not a \.safetensors file"):
        check_job(job(tmp_path, train={"base_model": __file__}))


@pytest.mark.parametrize("inside", ["in", "in/deep", "link"])
def test_a_job_that_would_write_among_its_pictures_is_refused(tmp_path: Path, inside: str) -> None:
    (tmp_path / "link").symlink_to(tmp_path / "in")
    with pytest.raises(ConfigError, match="lies inside"):
        check_job(job(tmp_path, out=tmp_path / inside))
