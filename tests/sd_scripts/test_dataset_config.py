"""--dataset_config: datasets of subsets as parameters of one run, and a reason for everything that has none."""

from __future__ import annotations

import tomllib
from pathlib import Path

import orjson
import pytest

from sdxl_core.config import JobConfig, TrainConfig
from sdxl_core.configfile import check
from sdxl_core.errors import ConfigError
from sdxl_core.sd_scripts import Imported, as_toml, import_command

COMMAND = (
    "accelerate launch sdxl_train.py --pretrained_model_name_or_path=m.safetensors --output_dir=F:/out "
    "--train_batch_size=1 --shuffle_caption {more}--dataset_config"
)
CACHED = """
[general]
enable_bucket = true
keep_tokens = 1
caption_dropout_rate = 0.1
[[datasets]]
resolution = [1024, 1024]
batch_size = 4
  [[datasets.subsets]]
  image_dir = 'H:\\astolfo'
  metadata_file = 'H:\\astolfo\\meta_lat.json'
  num_repeats = 1
  keep_tokens = 2
  shuffle_caption = false
"""
FOLDERS = """
[general]
caption_extension = '.txt'
[[datasets]]
resolution = 768
batch_size = 2
min_bucket_reso = 320
max_bucket_reso = 1536
bucket_reso_steps = 64
bucket_no_upscale = true
enable_bucket = true
  [[datasets.subsets]]
  image_dir = 'C:\\hoge'
  class_tokens = 'hoge girl'
  num_repeats = 10
  keep_tokens = 2
  [[datasets.subsets]]
  image_dir = 'C:\\fuga'
  keep_tokens = 3
  flip_aug = true
  random_thing = 5
  [[datasets.subsets]]
  is_reg = true
  image_dir = 'C:\\reg'
[[datasets]]
  [[datasets.subsets]]
  image_dir = 'C:\\piyo'
  metadata_file = 'C:\\piyo\\md.json'
"""


def imported(folder: Path, config: str, *, name: str = "data.toml", more: str = "") -> Imported:
    (folder / name).write_text(config, "utf-8")
    (folder / "command.txt").write_text(f"{COMMAND.format(more=more)} {name}")
    return import_command(folder / "command.txt", root_map={"H:": "/mnt/h", "F:": "/mnt/f", "C:": "/mnt/c"})


def test_one_subset_with_metadata_is_trained_on(tmp_path: Path) -> None:
    told = imported(tmp_path, CACHED)
    config = check(TrainConfig, tomllib.loads(as_toml(told, source="x")), where="test")
    assert (config.metadata, config.latents) == (Path("/mnt/h/astolfo/meta_lat.json"), Path("/mnt/h/astolfo"))
    assert config.train_batch_size == 4, "the file wins over the command line"
    assert config.keep_tokens == 2 and not config.shuffle_caption, "a subset over [general], and over the command line"
    assert config.caption_dropout_rate == 0.1
    assert "read as if they stood on the command line" in told.not_mapped["--dataset_config"]
    assert {"--enable_bucket", "--resolution"} <= set(told.not_mapped) and not told.notes[0].startswith("these are")


def test_several_metadata_files_of_one_folder_are_joined_first(tmp_path: Path) -> None:
    more = "  [[datasets.subsets]]\n  image_dir = 'H:\\astolfo'\n  metadata_file = 'H:\\astolfo\\two.json'\n"
    told = imported(tmp_path, CACHED + more)
    assert told.values["metadata"] == "/mnt/f/out/meta_joined.json"
    expected = 'merge-json --sources "/mnt/h/astolfo/meta_lat.json" "/mnt/h/astolfo/two.json" --out "/mnt/f/out/meta_j'
    assert any(expected in note for note in told.notes)
    assert "2 of dataset 1, subset 1 was taken" in told.not_mapped["keep_tokens (data.toml)"]
    elsewhere = imported(tmp_path, CACHED + more.replace("astolfo'", "other'"))
    assert elsewhere.values["metadata"] == "/mnt/h/astolfo/meta_lat.json"
    (why,) = [why for name, why in elsewhere.not_mapped.items() if name.startswith("dataset 1, subset 2 (")]
    assert "latents are read below one folder" in why


def test_folders_become_a_job_over_a_catalog(tmp_path: Path) -> None:
    told = imported(tmp_path, FOLDERS, more="--train_data_dir=old --in_json=old.json ")
    text = as_toml(told, source="x")
    job = check(JobConfig, tomllib.loads(text), where="test")
    assert job.source.path == Path("/mnt/f/out/catalog") and job.source.tag_extension == ".txt"
    command = 'catalog --sources "hoge/=/mnt/c/hoge" "fuga/=/mnt/c/fuga" --out "/mnt/f/out/catalog"'
    assert f"# Note: these are 2 folders; make a catalog of them first: sdxl-flows {command}." in text
    latents = job.latents
    assert (latents.resolution_px, latents.min_bucket_px, latents.max_bucket_px) == (768, 320, 1536)
    assert latents.no_upscale and latents.flip_aug and job.train.train_batch_size == 2 and job.train.keep_tokens == 2
    why = told.not_mapped
    assert "regularisation" in why["dataset 1, subset 3 (image_dir = C:\\reg)"]
    assert "cache this one, too" in why["dataset 2, subset 1 (image_dir = C:\\piyo, metadata_file = C:\\piyo\\md.json)"]
    assert "True of dataset 1, subset 2 was taken" in why["flip_aug (data.toml)"]
    assert "2 of dataset 1, subset 1 was taken" in why["keep_tokens (data.toml)"]
    assert "without a text file" in why["class_tokens (data.toml)"]
    assert "no such option of a dataset" in why["random_thing (data.toml)"]
    assert "ask for more epochs" in why["--dataset_repeats"]
    assert "ignores it beside --dataset_config" in why["--train_data_dir"] and "--in_json" in why


def test_folders_of_one_name_have_prefixes_of_their_own(tmp_path: Path) -> None:
    told = imported(tmp_path, FOLDERS.replace("C:\\fuga'", "C:\\more\\hoge'"))
    assert any('--sources "1-hoge/=/mnt/c/hoge" "2-hoge/=/mnt/c/more/hoge"' in note for note in told.notes)


def test_one_folder_is_the_source_itself_and_json_is_read(tmp_path: Path) -> None:
    config = {"datasets": [{"resolution": 1024, "subsets": [{"image_dir": "pictures", "caption_prefix": "best, "}]}]}
    told = imported(tmp_path, orjson.dumps(config).decode(), name="data.json")
    assert told.values["source"]["path"] == "pictures" and told.values["train"]["caption_prefix"] == "best, "


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ("a = 1", r"there is no \[\[datasets.subsets\]\] in it"),
        ("[[datasets]\n", "not valid TOML"),
        ("[[datasets]]\n[[datasets.subsets]]\nis_reg = true\nimage_dir = 'a'", "none of its subsets can be trained on"),
        ("[[datasets]]\n[[datasets.subsets]]\nmetadata_file = 'a.json'", "it names no image_dir"),
        ("[[datasets]]\nsubsets = 3", "is not a dataset config"),
        ("datasets = 'x'", "is not a dataset config"),
    ],
)
def test_what_cannot_be_read_is_one_clear_paragraph(tmp_path: Path, config: str, words: str) -> None:
    with pytest.raises(ConfigError, match=words) as error:
        imported(tmp_path, config)
    assert "\n" not in str(error.value)


def test_a_file_that_is_not_there_is_told(tmp_path: Path) -> None:
    (tmp_path / "command.txt").write_text(COMMAND.format(more="") + " gone.toml")
    with pytest.raises(ConfigError, match=r"--dataset_config gone\.toml is not there"):
        import_command(tmp_path / "command.txt")
