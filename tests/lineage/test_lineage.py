"""A checkpoint knows where it came from, wherever it has gone since."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file
from support.pictures import encoded, picture

from sdxl_core.cli import main
from sdxl_core.config import JobConfig, TrainConfig
from sdxl_core.errors import CheckpointError, ConfigError, DataError
from sdxl_core.latents.cache import cache_latents
from sdxl_core.lineage import trace
from sdxl_core.merge.plan import merge_tags
from sdxl_core.run_record import _write_lineage, record_stage
from sdxl_core.subset.stage import subset
from sdxl_core.training.launch import launch_training

TAGS = {"1": "boat, sea", "2": "boat, night", "3": "hill, sea"}


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a finished run: two of three pictures picked by a query, one step trained."""
    folder = tmp_path_factory.mktemp("lineage")
    (folder / "in").mkdir()
    for name, tags in TAGS.items():
        (folder / "in" / f"{name}.png").write_bytes(encoded(picture(64, 64, seed=int(name)), "PNG"))
        (folder / "in" / f"{name}.txt").write_text(tags)
    job = JobConfig.model_validate(
        {
            "out": folder / "run", "source": {"path": folder / "in"}, "subset": {"query": "boat"},
            "latents": {"resolution_px": 64, "min_bucket_px": 64, "max_bucket_px": 64},
            "train": {"max_train_steps": 1, "learning_rate": 1e-5, "use_cpu": True},
        }
    )  # fmt: skip
    picked = subset(job.subset_config())
    record_stage(job.out, "subset", job.subset_config(), picked)
    record_stage(job.out, "merge-tags", job.merge_config(picked), merge_tags(job.merge_config(picked)))
    record_stage(job.out, "cache-latents", job.latents_config(picked), cache_latents(job.latents_config(picked)))
    record_stage(job.out, "train", job.train_config(), launch_training(job.train_config()))
    return job.out


def test_a_checkpoint_leads_back_to_query_pictures_tags_settings_and_code(run: Path) -> None:
    found = trace(run / "model" / "last.safetensors")
    assert found.query == "boat" and found.num_steps == 1 and found.config["learning_rate"] == 1e-5
    assert list(found.stages) == ["subset", "merge-tags", "cache-latents", "train"]
    assert {(image["key"], image["tags"]) for image in found.images()} == {("1", "boat, sea"), ("2", "boat, night")}
    assert found.tag_counts() == {"boat": 2, "sea": 1, "night": 1}
    assert [check.state for check in found.checks] == ["same"] * 3
    assert found.versions["torch"] and found.code["version"]


def test_it_is_found_after_file_and_folder_have_moved(run: Path, tmp_path: Path) -> None:
    shutil.copytree(run, tmp_path / "elsewhere")
    file = tmp_path / "other name.safetensors"
    (tmp_path / "elsewhere" / "model" / "last.safetensors").rename(file)
    found = trace(file, run=tmp_path / "elsewhere")
    assert found.run == tmp_path / "elsewhere" and len(list(found.images())) == 2


def test_metadata_that_lies_elsewhere_is_found_where_it_was(run: Path, tmp_path: Path) -> None:
    """As of a training file of its own: its out folder holds no meta_lat.json."""
    shutil.copytree(run, tmp_path / "run")
    (tmp_path / "run" / "meta_lat.json").unlink()
    found = trace(tmp_path / "run" / "model" / "last.safetensors")
    assert found.checks[0].path == run / "meta_lat.json" and found.checks[0].state == "same"
    assert len(list(found.images())) == 2


def test_from_the_file_alone_everything_but_the_pictures_is_known(run: Path, tmp_path: Path) -> None:
    shutil.copytree(run, tmp_path / "run")
    file = tmp_path / "alone.safetensors"
    shutil.copy(run / "model" / "last.safetensors", file)
    run.rename(run.with_name("away"))
    try:
        found = trace(file)
    finally:
        run.with_name("away").rename(run)
    assert found.run is None and found.query == "boat"
    assert "kept 2 of 3" in found.stages["subset"]["summary"]
    with pytest.raises(DataError, match="--run"):
        list(found.images())


def test_what_was_changed_since_is_told(run: Path, tmp_path: Path) -> None:
    shutil.copytree(run, tmp_path / "run")
    metadata = tmp_path / "run" / "meta_lat.json"
    metadata.write_text(metadata.read_text().replace("night", "day"))
    (tmp_path / "run" / "meta_cap_dd.json").unlink()
    found = trace(tmp_path / "run" / "model" / "last.safetensors", run=tmp_path / "run")
    assert {check.path.name: check.state for check in found.checks} == {
        "meta_lat.json": "changed", "meta_cap_dd.json": "gone", "last.safetensors": "same",
    }  # fmt: skip
    with pytest.raises(DataError, match="as it was"):
        list(found.images())


def test_the_command_prints_the_chain_the_pictures_and_a_page(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = str(run / "model" / "last.safetensors")
    main(["lineage", file, "--html", str(tmp_path / "page.html")])
    text = capsys.readouterr().out
    assert "query    boat" in text and "kept 2 of 3 pictures" in text and "unchanged" in text
    page = (tmp_path / "page.html").read_text()
    assert "How last.safetensors came to be" in page and "boat, night" in page and "src=" not in page
    main(["lineage", file, "--images"])
    assert [json.loads(line)["key"] for line in capsys.readouterr().out.splitlines()] == ["1", "2"]


def test_a_diffusers_folder_leads_back_as_a_file_does(run: Path, tmp_path: Path) -> None:
    """Trained with save_model_as = "diffusers", recorded and drawn by the run; then altered."""
    job = json.loads((run / "run.json").read_text())["stages"]["train"]["config"]
    shutil.copytree(run, tmp_path / "run", ignore=shutil.ignore_patterns("model"))
    paths = {"out": tmp_path / "run", "metadata": tmp_path / "run" / "meta_lat.json"}
    config = TrainConfig.model_validate(job | paths | {"save_model_as": "diffusers"})
    record_stage(config.out, "train", config, launch_training(config))
    folder = config.out / "model" / "last"
    found = trace(folder)
    assert found.query == "boat" and found.run == config.out and len(list(found.images())) == 2
    assert [check.state for check in found.checks] == ["same"] * 3
    assert json.loads((folder / "sdxl_flows.json").read_text())["modelspec.resolution"] == "64x64"
    page = _write_lineage(folder, config.out)
    assert page is not None and "How last came to be" in page.read_text()
    main(["lineage", str(folder)])
    weights = folder / "unet" / "diffusion_pytorch_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"x")
    assert [check.state for check in trace(folder).checks] == ["same", "same", "changed"]
    with pytest.raises(ConfigError, match="no unet/"):
        trace(tmp_path)


def test_other_files_are_told_apart(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no such file"):
        trace(tmp_path / "none.safetensors")
    (tmp_path / "cut.safetensors").write_bytes(b"\x10\0\0\0\0\0\0\0{")
    with pytest.raises(CheckpointError, match="cut short"):
        trace(tmp_path / "cut.safetensors")
    save_file({"a": np.zeros(1)}, tmp_path / "foreign.safetensors", {"modelspec.title": "Somebody's"})
    with pytest.raises(CheckpointError, match="made by Somebody's"):
        trace(tmp_path / "foreign.safetensors")
