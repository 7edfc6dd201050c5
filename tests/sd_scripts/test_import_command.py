"""sd-scripts' command lines as ours: the two that must work whole, and everything people do to such lines."""

from __future__ import annotations

import tomllib
from pathlib import Path
from typing import Any

import pytest

from sdxl_core.cli import main
from sdxl_core.config import JobConfig, TrainConfig
from sdxl_core.config.train import TrainOptions
from sdxl_core.configfile import check
from sdxl_core.errors import ConfigError
from sdxl_core.sd_scripts import Imported, as_toml, import_command, option_table, options_markdown
from sdxl_core.sd_scripts.command_line import split_words

SHARED = (
    '--pretrained_model_name_or_path="F:/models/x215c.safetensors" --in_json "H:/just_astolfo/meta_lat.json" '
    '--train_data_dir="H:/just_astolfo/kohyas_finetune" --output_dir="F:/out/finetune_job" '
    '--save_model_as=safetensors --caption_extension=".txt" --use_8bit_adam --train_batch_size=1 {rate} '
    "--max_train_steps=10000 --xformers --diffusers_xformers --gradient_checkpointing --full_bf16 "
    "--mixed_precision=bf16 --save_precision=fp16 --enable_bucket --cache_latents --save_every_n_epochs=1"
)
LAUNCH = "accelerate launch --num_cpu_threads_per_process 8 sdxl_train.py "
FIRST = LAUNCH + SHARED.format(rate="--learning_rate=4e-7")
SECOND = (
    LAUNCH
    + SHARED.format(rate="--learning_rate=4e-7")
    + (
        ' --log_with=tensorboard --logging_dir="F:/out/tensorboard" --log_prefix=just_astolfo_24121401_ '
        "--learning_rate=1e-5 --max_train_epochs=10 --train_text_encoder"
    )
)
TEXTS_ONLY = SECOND.replace(
    "--learning_rate=1e-5", "--learning_rate=0 --learning_rate_te1=1e-5 --learning_rate_te2=1e-5"
)
MINIMAL = (
    "sdxl_train.py --pretrained_model_name_or_path=m.safetensors --in_json=i.json --train_data_dir=d --output_dir=o"
)


def imported(folder: Path, text: str, **options: Any) -> Imported:
    path = folder / "command.txt"
    path.write_text(text, "utf-8")
    return import_command(path, **options)


def training(folder: Path, text: str, **options: Any) -> TrainConfig:
    """What training starts from, read back from the TOML that is written."""
    toml = as_toml(imported(folder, text, **options), source="command.txt")
    return check(TrainConfig, tomllib.loads(toml), where="test")


def test_every_option_becomes_a_parameter_or_has_a_reason() -> None:
    table = option_table()
    assert len(table) == 176
    known = {f"train.{name}" for name in TrainOptions.model_fields} | {"out", "metadata", "latents"}
    known |= {
        f"{s}.{name}" for s in ("latents", "source") for name in JobConfig.model_fields[s].annotation.model_fields
    }
    for option in table.values():
        assert bool(option.to) != bool(option.why), option.name
        assert not option.to or option.to in known, option
        assert not option.why or (len(option.why) > 8 and f"train.{option.name}" not in known), option


def test_the_page_has_every_option() -> None:
    page = Path(__file__).parents[2] / "docs" / "from_sd_scripts.md"
    assert options_markdown() in page.read_text("utf-8")


def test_the_first_command_line_is_carried_over_whole(tmp_path: Path) -> None:
    config = training(tmp_path, FIRST, root_map={"F:": "/mnt/f", "H:/just_astolfo": "/data/astolfo"})
    assert config.base_model == "/mnt/f/models/x215c.safetensors"
    assert (config.metadata, config.latents) == (
        Path("/data/astolfo/meta_lat.json"),
        Path("/data/astolfo/kohyas_finetune"),
    )
    assert config.out == Path("/mnt/f/out/finetune_job")
    assert (config.learning_rate, config.learning_rate_te1, config.learning_rate_te2) == (4e-7, 0, 0)
    assert (config.optimizer, config.train_batch_size, config.max_train_steps) == ("adamw8bit", 1, 10_000)
    assert (config.weights_dtype, config.mixed_precision, config.save_precision) == ("bfloat16", "bf16", "fp16")
    assert config.gradient_checkpointing == "all" and config.save_model_every_epochs == 1
    assert config.lr_scheduler == "constant" and config.save_model_as == "safetensors"
    told = imported(tmp_path, FIRST)
    assert set(told.not_mapped) == {
        "--num_cpu_threads_per_process (accelerate launch)", "--xformers", "--diffusers_xformers", "--enable_bucket",
        "--cache_latents", "--caption_extension",
    }  # fmt: skip
    assert any("Windows path" in note for note in told.notes)


def test_the_second_trains_both_text_encoders_at_the_later_rate(tmp_path: Path) -> None:
    config = training(tmp_path, SECOND)
    assert (config.learning_rate, config.learning_rate_te1, config.learning_rate_te2) == (1e-5, 1e-5, 1e-5)
    assert (config.max_train_epochs, config.log_prefix) == (10, "just_astolfo_24121401_")
    told = imported(tmp_path, SECOND)
    assert {"--log_with", "--logging_dir", "--train_text_encoder"} <= set(told.not_mapped)
    words = {word.split("=")[0] for word in SECOND.split() if word.startswith("--")}
    named = {name.split()[0] for name in (*told.mapped, *told.not_mapped)}
    assert words == named, "every option is accounted for"


def test_text_encoders_only(tmp_path: Path) -> None:
    config = training(tmp_path, TEXTS_ONLY)
    assert (config.learning_rate, config.learning_rate_te1, config.learning_rate_te2) == (0, 1e-5, 1e-5)


@pytest.mark.parametrize(
    "text",
    [
        FIRST.replace(" --", " ^\r\n  --"),
        "@echo off\r\nREM sdxl_train.py --v2\r\ncd sd-scripts\r\ncall venv\\Scripts\\activate\r\n" + FIRST + "\r\n",
        "#!/bin/sh\n# sdxl_train.py --old\n" + FIRST.replace(" --", " \\\n    --") + "\n",
        FIRST.replace(" --", " `\n    --"),
        FIRST.replace("F:/", "F:\\\\").replace("\\\\", "\\").replace("H:/just_astolfo/", "H:\\just_astolfo\\"),
        FIRST.replace("accelerate launch", "CUDA_VISIBLE_DEVICES=0 accelerate launch"),
        "﻿" + FIRST.replace("sdxl_train.py", "/opt/sd-scripts/sdxl_train.py"),
    ],
)
def test_lines_may_be_continued_quoted_and_surrounded_as_people_have_them(tmp_path: Path, text: str) -> None:
    assert imported(tmp_path, text).values == imported(tmp_path, FIRST).values


def test_words_are_split_as_the_shell_would() -> None:
    assert split_words(r"--a=F:\x\ --b 'c d' --e=\"f", is_windows=True, where="t") == [
        "--a=F:\\x\\",
        "--b",
        "c d",
        '--e="f',
    ]
    assert split_words(r"--a=/my\ dir --b='c\d' " + '--e="f\\"g"', is_windows=False, where="t") == [
        "--a=/my dir", "--b=c\\d", '--e=f"g',
    ]  # fmt: skip


def test_a_config_file_is_read_and_the_command_line_wins(tmp_path: Path) -> None:
    (tmp_path / "settings.toml").write_text(
        "[optimizer_arguments]\nlearning_rate = 2e-6\noptimizer_args = ['weight_decay=0.1', 'betas=0.9,0.95']\n"
        "[b]\nshuffle_caption = true\nflip_aug = false\nmax_train_steps = 7\nnetwork_dim = 8\nmin_snr_gamma = 5\n"
    )
    told = imported(tmp_path, MINIMAL + " --config_file=C:\\me\\settings --max_train_steps 9")
    config = training(tmp_path, MINIMAL + " --config_file=settings.toml --max_train_steps 9")
    assert (config.learning_rate, config.max_train_steps, config.min_snr_gamma) == (2e-6, 9, 5)
    assert config.shuffle_caption and not config.flip_aug
    assert (config.weight_decay, config.adam_betas) == (0.1, (0.9, 0.95))
    assert "network_dim" in told.not_mapped and "no such option" in told.not_mapped["network_dim"]
    with pytest.raises(ConfigError, match=r"--config_file other\.toml is not there"):
        imported(tmp_path, MINIMAL + " --config_file=other")


def test_what_is_left_unsaid_is_sd_scripts_default(tmp_path: Path) -> None:
    config = training(tmp_path, MINIMAL)
    assert (config.learning_rate, config.max_train_steps) == (2e-6, 1600)
    assert (config.optimizer, config.weights_dtype, config.mixed_precision) == ("adamw", "float32", "no")
    assert (config.save_precision, config.gradient_checkpointing) == ("fp32", "none")


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ("--optimizer_type=Lion8bit", {"optimizer": "lion8bit"}),
        ("--optimizer_type Adafactor --optimizer_args relative_step=False warmup_init=False scale_parameter=False",
         {"optimizer": "adafactor", "optimizer_args": {"scale_parameter": False}, "weight_decay": 0.0}),
        ("--optimizer_type Adafactor --optimizer_args relative_step=False weight_decay=0.1",
         {"optimizer": "adafactor", "optimizer_args": {"scale_parameter": True}, "weight_decay": 0.1}),
        ("--optimizer_type Lion8bit --optimizer_args betas=0.95,0.98",
         {"optimizer_args": {"betas": [0.95, 0.98]}, "adam_betas": (0.9, 0.999), "weight_decay": 0.0}),
        ("--optimizer_type=torch.optim.RAdam --optimizer_args weight_decay=0.1 betas=0.8,0.9",
         {"optimizer": "torch.optim.RAdam", "optimizer_args": {"weight_decay": 0.1, "betas": [0.8, 0.9]}}),
        ("--optimizer_type=AdamW --optimizer_args weight_decay=0.1 betas=0.8,0.9 amsgrad=True",
         {"optimizer_args": {"amsgrad": True}, "weight_decay": 0.1, "adam_betas": (0.8, 0.9)}),
        ("--lr_warmup_steps=10", {"lr_scheduler": "constant_with_warmup", "lr_warmup_steps": 10}),
        ("--lr_scheduler=cosine_with_restarts --lr_scheduler_num_cycles=3",
         {"lr_scheduler": "cosine_with_restarts", "lr_scheduler_num_cycles": 3}),
        ("--block_lr=" + ",".join(["0", *["1e-6"] * 22]), {"block_lr": (0.0, *[1e-6] * 22)}),
        ("--max_token_length=225 --caption_dropout_rate 0.1", {"max_token_length": 225, "caption_dropout_rate": 0.1}),
        (
            "--enable_wildcard --weighted_captions --caption_prefix best --caption_tag_dropout_rate=0.1",
            {
                "enable_wildcard": True, "caption_line": "random", "weighted_captions": True, "caption_prefix": "best",
                "caption_tag_dropout_rate": 0.1,
            },
        ),
        ("--v_parameterization --zero_terminal_snr", {"prediction_type": "v_prediction", "zero_terminal_snr": True}),
        ("--save_every_n_steps=100 --save_last_n_steps=300 --save_state",
         {"save_model_every_steps": 100, "keep_models": 3, "save_every_steps": 100}),
        ("--save_model_as=diffusers_safetensors", {"save_model_as": "diffusers"}),
        ("--gradient_acc=4", {"gradient_accumulation_steps": 4}),
        ("--metadata_author=me --metadata_title 'My model'", {"modelspec": {"author": "me", "title": "My model"}}),
        ("--loss_type=huber --huber_schedule=constant --huber_c=0.2",
         {"loss_type": "huber", "huber_schedule": "constant", "huber_c": 0.2}),
        ("--caption_separator=';'", {"caption_separator": ";"}),
        ("--enable_wildcard --keep_tokens_separator='|||' --caption_prefix='best quality,' --token_warmup_step=0.5",
         {"enable_wildcard": True, "caption_line": "random", "keep_tokens_separator": "|||",
          "caption_prefix": "best quality,", "token_warmup_step": 0.5}),
        ("--caption_tag_dropout_rate=0.1 --caption_dropout_every_n_epochs=4 --weighted_captions",
         {"caption_tag_dropout_rate": 0.1, "caption_dropout_every_n_epochs": 4, "weighted_captions": True}),
    ],
)  # fmt: skip
def test_values_are_translated(tmp_path: Path, words: str, expected: dict[str, Any]) -> None:
    config = training(tmp_path, f"{MINIMAL} {words}")
    assert {name: getattr(config, name) for name in expected} == expected


@pytest.mark.parametrize(
    ("words", "option", "why"),
    [
        ("--optimizer_type=Prodigy", "--optimizer_type", "Prodigy is not among"),
        ("--lr_scheduler=inverse_sqrt", "--lr_scheduler", "inverse_sqrt is not among"),
        ("--learning_rate_te1=1e-6", "--learning_rate_te1", "without --train_text_encoder"),
        ("--save_model_as=ckpt", "--save_model_as", "pickle"),
        ("--deepspeed --zero_stage=3", "--zero_stage", "FSDP2"),
        ("--network_module=networks.lora", "--network_module", "no such option"),
        ("--vae=v.safetensors", "--vae", "cached already"),
    ],
)
def test_what_cannot_be_carried_over_says_why(tmp_path: Path, words: str, option: str, why: str) -> None:
    assert why in imported(tmp_path, f"{MINIMAL} {words}").not_mapped[option]


def test_a_rate_that_adafactor_would_have_found_itself_is_noted(tmp_path: Path) -> None:
    told = imported(tmp_path, f"{MINIMAL} --optimizer_type=Adafactor")
    assert any("Adafactor with relative steps" in note for note in told.notes)
    plain = imported(tmp_path, f"{MINIMAL} --optimizer_type=Adafactor --optimizer_args relative_step=False")
    assert not any("Adafactor" in note for note in plain.notes)


def test_processes_of_the_launcher_count(tmp_path: Path) -> None:
    config = training(tmp_path, f"accelerate launch --multi_gpu --num_processes=4 --mixed_precision=bf16 {MINIMAL}")
    assert (config.num_processes, config.mixed_precision) == (4, "bf16")


def test_without_cached_latents_it_becomes_a_job(tmp_path: Path) -> None:
    text = MINIMAL.replace("--in_json=i.json", "--resolution=1024,1024 --min_bucket_reso=512 --flip_aug")
    told = imported(tmp_path, text)
    job = check(JobConfig, tomllib.loads(as_toml(told, source="x")), where="test")
    assert told.kind == "job" and job.source.path == Path("d")
    assert (job.latents.resolution_px, job.latents.min_bucket_px, job.latents.max_bucket_px) == (1024, 512, 1024)
    assert job.latents.vae == job.train.base_model == "m.safetensors"
    assert job.latents.flip_aug and job.train.flip_aug and not job.latents.alpha_mask


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("accelerate launch train_network.py --a=1", "it runs train_network.py, which trains something else"),
        ("", "no line of it names that script"),
        (FIRST + "\n" + SECOND, "holds 2 command lines"),
        (FIRST + ' --output_name="x', "is opened and never closed"),
        (MINIMAL + " --seed", "--seed needs a value"),
        (MINIMAL + " --save_every", "could be any of --save_every_n_epochs, --save_every_n_steps"),
        (MINIMAL + " --block_lr=1e-5,1e-5", "23"),
        (MINIMAL + " --learning_rate=fast", "--learning_rate: 'fast' is not a number"),
        (MINIMAL + " --train_batch_size=many", "train_batch_size = 'many'"),
        (MINIMAL + " --shuffle_caption=true", "takes no value"),
    ],
)
def test_what_cannot_be_read_is_one_clear_paragraph(tmp_path: Path, text: str, words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        imported(tmp_path, text)


def test_the_command_writes_toml_that_says_what_it_left_out(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "run.bat").write_text(FIRST)
    main(
        ["import-command", str(tmp_path / "run.bat"), "--out", str(tmp_path / "train.toml"), "--root-map", "F:=/mnt/f"]
    )
    text = (tmp_path / "train.toml").read_text()
    assert "#   --xformers: attention is PyTorch's" in text
    assert 'base_model = "/mnt/f/models/x215c.safetensors"' in text
    assert "options carried over, 6 not" in capsys.readouterr().err
