"""The commands about training: train, show-captions, plan, export."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

from sdxl_core.cli.common import add_command, add_flow, add_preset, add_set, read_job, run_stage
from sdxl_core.config import PlanConfig, TrainConfig, TrainOptions
from sdxl_core.configfile import apply_overrides, check, read_toml
from sdxl_core.errors import ConfigError

ATTENTION_WORDS = ("xformers", "diffusers-xformers", "mem-eff-attn", "sdpa")


def add_train(commands: Any, stage: Any) -> None:
    """`train`. Args: stage: of `stages.STAGES`."""
    command = add_command(commands, "train", stage.help, _train, stage=stage, name="train")
    add_flow(command)
    _add_training_file(command)
    command.add_argument(
        "--show-captions", type=int, metavar="N", help="print N captions as training tokenises them, and end"
    )
    for word in ATTENTION_WORDS:
        command.add_argument(f"--{word}", action="store_true", help="accepted: attention is PyTorch's SDPA in any case")


def add_show_captions(commands: Any) -> None:
    """`show-captions`."""
    command = add_command(
        commands, "show-captions", "print captions exactly as training tokenises them, and what is cut", _show_captions
    )
    _add_training_file(command)
    command.add_argument("--num", type=int, default=50, metavar="N", help="how many captions (default: 50)")


def add_plan(commands: Any) -> None:
    """`plan` and `export`."""
    plan = add_command(
        commands, "plan", "the memory a training run needs, by component, before anything is loaded", _plan
    )
    plan.add_argument("job", type=Path, nargs="?", metavar="JOB.toml", help="a job file")
    plan.add_argument("--config", type=Path, metavar="TRAIN.toml", help="training parameters only")
    plan.add_argument(
        "--card-gb", type=float, metavar="GIB",
        help="refuse what does not fit a card of this size in GiB, as cards are sold and nvidia-smi counts (default: "
        "this machine's smallest card)",
    )  # fmt: skip
    plan.add_argument("--width-px", type=int, default=1024, metavar="N", help="of the largest bucket (default: 1024)")
    plan.add_argument("--height-px", type=int, default=1024, metavar="N", help="(default: 1024)")
    add_set(plan)
    add_preset(plan)
    export = add_command(commands, "export", "a saved training state as a model file", _export)
    export.add_argument("state", type=Path, metavar="STATE", help="a folder such as OUT/state/step-00001000")
    export.add_argument("--out", type=Path, required=True, metavar="FILE.safetensors")
    export.add_argument("--ema", action="store_true", help="the average of the weights in place of the weights")


def _add_training_file(command: argparse.ArgumentParser) -> None:
    command.epilog = "`sdxl-flows parameters train` lists every parameter of the file and of --set: bounds, default."
    command.add_argument("job", type=Path, nargs="?", metavar="JOB.toml", help="a job file: trains what the job cached")
    command.add_argument("--config", type=Path, metavar="TRAIN.toml", help="training parameters only")
    add_set(command)
    add_preset(command)


def _train(options: argparse.Namespace) -> None:
    for word in ATTENTION_WORDS:
        if getattr(options, word.replace("-", "_")):
            print(f"--{word}: noted. Attention is PyTorch's scaled_dot_product_attention, which picks the fastest "
                  f"kernel for the card by itself; nothing else needs to be installed.", file=sys.stderr)  # fmt: skip
    config = _train_config(options, command="train")
    if options.show_captions is not None:
        _print_captions(config, options.show_captions, as_json=options.as_json)
        return
    run_stage(config, options)


def _train_config(options: argparse.Namespace, *, command: str) -> TrainConfig:
    """What a job file or a file of training parameters says."""
    if (options.job is None) == (options.config is None):
        raise ConfigError(f"sdxl-flows {command}: name either a job file ({command} JOB.toml) or --config TRAIN.toml.")
    if options.config is None:
        return read_job(options).train_config()
    from sdxl_core.presets import under_training

    values = apply_overrides(under_training(options.preset, read_toml(options.config)), options.overrides)
    return check(TrainConfig, values, where=str(options.config), overrides=options.overrides)


def _show_captions(options: argparse.Namespace) -> None:
    _print_captions(_train_config(options, command="show-captions"), options.num, as_json=options.as_json)


def _print_captions(config: TrainConfig, num: int, *, as_json: bool) -> None:
    """Text for people, or one JSON object a line."""
    import orjson

    from sdxl_core.training.show_captions import caption_lines, shown_captions

    captions = shown_captions(config, num)
    for line in (orjson.dumps(c).decode() for c in captions) if as_json else caption_lines(captions, config):
        print(line)


def _plan(options: argparse.Namespace) -> None:
    from sdxl_core.training.memory_plan import check_planned, describe_plan, planned, smallest_card_gib

    if options.job is not None:
        values = read_job(options).train.model_dump()
    else:
        from sdxl_core.presets import under_training

        values = under_training(options.preset, {} if options.config is None else read_toml(options.config))
        values = {key: value for key, value in values.items() if key in TrainOptions.model_fields}
        values = apply_overrides(values, options.overrides)
        if "base_model" not in values:
            print("no base_model is named: planned for SDXL", file=sys.stderr)
    values |= {name: getattr(options, name) for name in ("card_gb", "width_px", "height_px")}
    if values["card_gb"] is None:
        values["card_gb"] = smallest_card_gib()
    config = check(PlanConfig, values, where="sdxl-flows plan", overrides=options.overrides)
    plan = planned(config)
    check_planned(plan, config)
    print(describe_plan(plan, card_gib=config.card_gb))


def _export(options: argparse.Namespace) -> None:
    from sdxl_core.training.parts import save_checkpoint
    from sdxl_core.training.state import read_generation

    generation = read_generation(options.state)
    file = save_checkpoint(generation, path=options.out, weights="ema" if options.ema else "weights")
    print(f"step {generation.step} -> {file.path} ({file.num_bytes / 1e6:.1f} MB)")
