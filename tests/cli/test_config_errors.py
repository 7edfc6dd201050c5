"""What a wrong parameter answers: the key, the value, what is allowed."""

from pathlib import Path

import pytest

from sdxl_core.config import BucketOptions, CacheLatentsConfig, JobConfig, TrainOptions
from sdxl_core.configfile import apply_overrides, check, read_toml
from sdxl_core.errors import ConfigError

MINIMAL = {"out": "o", "source": {"path": "s"}}


def refused(values: dict, model: type = JobConfig) -> str:
    with pytest.raises(ConfigError) as caught:
        check(model, values, where="job.toml")
    return str(caught.value)


def test_a_misspelt_key_suggests_the_right_one() -> None:
    text = refused(MINIMAL | {"train": {"lerning_rate": 1e-5}})
    assert "train.lerning_rate: there is no such parameter. Did you mean train.learning_rate?" in text


def test_latents_of_a_random_vae_are_no_food_for_a_real_model() -> None:
    real = {"train": {"base_model": "m.safetensors"}}
    assert "latents.vae = 'tiny' has random weights" in refused(MINIMAL | real | {"latents": {"vae": "tiny"}})
    assert check(JobConfig, MINIMAL | real, where="job").latents_config(None).vae == "m.safetensors"
    assert check(JobConfig, MINIMAL, where="job").latents_config(None).vae == "tiny"
    own = check(JobConfig, MINIMAL | real | {"latents": {"vae": "v.safetensors"}}, where="job")
    assert own.latents_config(None).vae == "v.safetensors"


def test_latents_are_not_encoded_with_a_vae_that_nobody_named() -> None:
    assert "vae: is needed" in refused({"source": "s", "metadata": "m.json", "out": "o"}, CacheLatentsConfig)


@pytest.mark.parametrize(
    ("wrong", "meant"),
    [
        ("train.lr", "train.learning_rate?"),
        ("train.bs", "train.train_batch_size or "),
        ("train.max_steps", "train.max_train_steps or "),
        ("train.pretrained_model_name_or_path", "train.base_model?"),
        ("train.scheduler", "train.lr_scheduler"),
        ("latents.bucket_reso_steps", "latents.bucket_step_px?"),
        ("latents.resolution", "latents.resolution_px?"),
    ],
)
def test_sd_scripts_names_abbreviations_and_parts_of_names_are_understood(wrong: str, meant: str) -> None:
    assert f"Did you mean {meant}" in refused(apply_overrides(MINIMAL, [f"{wrong}=1"]))


def test_a_wrong_set_is_blamed_and_not_the_file() -> None:
    overrides = ["train.seed=1", "latents.resolution_px=7", "latents.min-bucket-px=512", "latents.max_bucket_px=256"]
    values = MINIMAL | {"latents": {"dtype": "int8"}}
    with pytest.raises(ConfigError) as caught:
        check(JobConfig, apply_overrides(values, overrides[:2]), where="job.toml", overrides=overrides[:2])
    told = str(caught.value).splitlines()
    assert told[0].startswith("--set latents.resolution_px=7: latents.resolution_px = 7: input should be greater")
    assert told[1].startswith("job.toml: latents.dtype = 'int8'")
    with pytest.raises(ConfigError, match=r"^job.toml with --set latents.min-bucket-px=512 with --set latents.max_"):
        check(JobConfig, apply_overrides(MINIMAL, overrides[2:]), where="job.toml", overrides=overrides[2:])


def test_a_missing_key_is_named() -> None:
    assert "source.path: is needed" in refused({"out": "o", "source": {}})


def test_a_value_out_of_bounds_is_shown_with_its_key() -> None:
    text = refused(MINIMAL | {"train": {"train_batch_size": 0}})
    assert "train.train_batch_size = 0" in text and "greater than or equal to 1" in text


def test_every_wrong_value_is_told_at_once() -> None:
    text = refused(MINIMAL | {"train": {"seed": -1}, "latents": {"dtype": "int8"}})
    assert "train.seed" in text and "latents.dtype" in text


def test_buckets_that_contradict_each_other_are_refused() -> None:
    text = refused({"min_bucket_px": 2048, "resolution_px": 1024}, BucketOptions)
    assert "min_bucket_px 2048 <= resolution_px 1024" in text


def test_nothing_to_train_is_refused() -> None:
    assert "nothing would train" in refused({"learning_rate": 0}, TrainOptions)


def test_infinite_rates_are_refused() -> None:
    assert "learning_rate" in refused({"learning_rate": float("inf")}, TrainOptions)


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("train.learning_rate=1e-5", {"train": {"learning_rate": 1e-5}}),
        ("train.base-model=a b.safetensors", {"train": {"base_model": "a b.safetensors"}}),
        ("latents.devices=0,1", {"latents": {"devices": "0,1"}}),
        ("subset.query='1girl -comic'", {"subset": {"query": "1girl -comic"}}),
        ('train.sample_prompts=["a", "b"]', {"train": {"sample_prompts": ["a", "b"]}}),
    ],
)
def test_set_reads_toml_values_and_plain_words(override: str, expected: dict) -> None:
    assert apply_overrides({}, [override]) == expected


def test_set_keeps_the_other_keys_of_a_section() -> None:
    values = {"train": {"seed": 3}}
    assert apply_overrides(values, ["train.max_train_steps=5"]) == {"train": {"seed": 3, "max_train_steps": 5}}
    assert values == {"train": {"seed": 3}}


@pytest.mark.parametrize("override", ["novalue", "=3", "out.path=3"])
def test_a_malformed_set_is_refused(override: str) -> None:
    with pytest.raises(ConfigError, match="--set"):
        apply_overrides({"out": "o"}, [override])


def test_a_number_given_for_a_text_is_taken_as_text() -> None:
    job = check(JobConfig, MINIMAL | {"latents": {"devices": 0}}, where="job.toml")
    assert job.latents.devices == "0"


def test_broken_toml_names_the_line_and_windows_paths(tmp_path: Path) -> None:
    path = tmp_path / "job.toml"
    path.write_text('out = "C:\\users"\n')
    with pytest.raises(ConfigError, match=r"job\.toml: not valid TOML.*line 1.*single quotes"):
        read_toml(path)


@pytest.mark.parametrize("make", ["missing", "folder", "binary"])
def test_a_job_file_that_is_none_is_refused(tmp_path: Path, make: str) -> None:
    path = tmp_path / "job.toml"
    if make == "folder":
        path.mkdir()
    if make == "binary":
        path.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ConfigError, match=r"job\.toml"):
        read_toml(path)
