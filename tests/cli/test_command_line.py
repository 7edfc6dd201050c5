"""The command line: one option a parameter, exit statuses, one paragraph an error."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from sdxl_core.cli import STAGES, build_parser, main
from sdxl_core.cli.options import collect_options, dashes
from sdxl_core.config import CacheLatentsConfig, TrainOptions
from sdxl_core.configfile import check


def parse(*argv: str) -> dict[str, Any]:
    options = build_parser().parse_args(dashes(argv))
    return collect_options(options, options.stage.config)


def test_every_parameter_of_every_stage_is_in_its_help(capsys: pytest.CaptureFixture[str]) -> None:
    for name, stage in STAGES.items():
        if name == "train":
            continue
        with pytest.raises(SystemExit):
            main([name, "--help"])
        text = capsys.readouterr().out
        assert all("--" + field.replace("_", "-") in text for field in stage.config.model_fields)


def test_options_reach_the_config_with_their_types() -> None:
    values = parse(
        "cache-latents", "--source", "s", "--metadata=m.json", "--out", "o", "--vae", "v.safetensors",
        "--batch_size=8", "--no-upscale", "--max-cropped-share", "0.5", "--root-map", "H:/a=/data/a",
        "--only-shards", "3,1",
    )  # fmt: skip
    config = check(CacheLatentsConfig, values, where="test")
    assert (config.batch_size, config.no_upscale, config.max_cropped_share) == (8, True, 0.5)
    assert config.only_shards == (3, 1) and config.root_map == {"H:/a": "/data/a"} and config.metadata == Path("m.json")


@pytest.mark.parametrize("query", ["-day", "-has:tags", "-day -night", "1girl"])
def test_a_query_may_begin_with_a_dash(query: str) -> None:
    assert parse("subset", "--source", "s", "--query", query, "--explain") == {"source": "s", "query": query}


def test_help_and_list_and_form_show_the_same_bounds(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["cache-latents", "--help"])
    words = " ".join(capsys.readouterr().out.split())
    assert "sides are multiples of this [8 to 1,024, a multiple of 8] (default: 64)" in words
    main(["parameters", "latents"])
    told = capsys.readouterr().out
    assert "latents.bucket_step_px = 64   (whole number)\n    sides are multiples of this [8 to 1,024" in told
    form = CacheLatentsConfig.model_json_schema()["properties"]
    assert form["bucket_step_px"]["description"].endswith("[8 to 1,024, a multiple of 8]")


def test_every_parameter_of_a_job_is_listed_and_found_by_its_name(capsys: pytest.CaptureFixture[str]) -> None:
    main(["parameters"])
    told = capsys.readouterr().out
    assert all(f"\ntrain.{name} " in told for name in TrainOptions.model_fields)
    assert told.startswith("out (needed)   (path)\n") and "\nsource.path (needed)" in told
    main(["parameters", "lr", "te1", "--json"])
    found = {one["name"]: one for one in json.loads(capsys.readouterr().out)}
    assert {"train.learning_rate", "train.lr_scheduler", "train.learning_rate_te1"} <= set(found)
    assert found["train.lr_scheduler"]["default"] == "constant" and "train.seed" not in found


def run(*argv: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "sdxl_core.cli", *argv]
    environment = {"PATH": "/usr/bin:/bin", "PYTHONPATH": str(Path(__file__).parents[2])}
    return subprocess.run(command, capture_output=True, text=True, cwd=cwd, env=environment, check=False)


@pytest.mark.parametrize(
    ("argv", "status", "words"),
    [
        ([], 2, "COMMAND"),
        (["no-such-command"], 2, "invalid choice"),
        (["merge-tags", "--source", "nowhere", "--out", "m.json"], 2, "nowhere"),
        (["merge-tags", "--source", ".", "--out", "m.json", "--num-shards", "0"], 2, "num_shards = 0"),
        (["run", "nothing.toml"], 2, "nothing.toml: there is no such file"),
        (["train"], 2, "--config TRAIN.toml"),
        (["up", "--port", "99999"], 2, "'99999' is no port"),
        (["up", "--tensorboard-port", "-1"], 2, "'-1' is no port"),
        (["up", "--data-root", "nowhere"], 2, "--data-root nowhere: there is no such folder"),
    ],
)
def test_a_wrong_call_ends_with_status_2_and_no_traceback(
    argv: list[str], status: int, words: str, tmp_path: Path
) -> None:
    done = run(*argv, cwd=tmp_path)
    assert done.returncode == status
    assert words in done.stderr and "Traceback" not in done.stderr


def test_a_stage_prints_its_result_as_json(tmp_path: Path) -> None:
    (tmp_path / "pictures").mkdir()
    (tmp_path / "pictures" / "a.png").write_bytes(b"not opened by this stage")
    (tmp_path / "pictures" / "a.txt").write_text("1girl, solo")
    done = run("merge-tags", "--source", "pictures", "--out", "m.json", "--json", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["num_kept"] == 1
    assert json.loads((tmp_path / "m.json").read_text()) == {"a": {"tags": "1girl, solo"}}


def test_what_the_file_system_refuses_is_a_paragraph(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "latents" / ".ledger" / "settings.json").mkdir(parents=True)
    with pytest.raises(SystemExit) as ended:
        main(["verify", str(tmp_path)])
    told = capsys.readouterr().err
    assert ended.value.code == 1 and "settings.json: Is a directory. What was finished is kept" in told


def test_attention_words_are_accepted_and_explained(tmp_path: Path) -> None:
    done = run("train", "nothing.toml", "--xformers", cwd=tmp_path)
    assert "--xformers: noted" in done.stderr and done.returncode == 2


def test_help_needs_no_heavy_package(tmp_path: Path) -> None:
    code = (
        "import sys, sdxl_core.cli\n"
        "try: sdxl_core.cli.main(['cache-latents', '--help'])\n"
        "except SystemExit: pass\n"
        "heavy = {'torch', 'cv2', 'diffusers', 'transformers', 'prefect', 'pyarrow', 'PIL'} & set(sys.modules)\n"
        "sys.exit(f'imported {heavy}' if heavy else 0)"
    )
    environment = {"PATH": "/usr/bin:/bin", "PYTHONPATH": str(Path(__file__).parents[2])}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
