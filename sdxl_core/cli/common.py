"""What the commands have in common: options, running a stage, printing its result, reaching the flows."""

from __future__ import annotations

import argparse
from importlib import import_module
from pathlib import Path
from typing import Any

from sdxl_core.config import JobConfig
from sdxl_core.configfile import apply_overrides, check, read_toml
from sdxl_core.errors import ConfigError


def add_command(commands: Any, word: str, text: str, run: Any, **defaults: Any) -> argparse.ArgumentParser:
    """A command that calls `run`, with the options that all have."""
    command: argparse.ArgumentParser = commands.add_parser(word, help=text, description=text, allow_abbrev=False)
    command.set_defaults(run=run, **defaults)
    command.add_argument("--json", action="store_true", dest="as_json", help="print the result as JSON on stdout")
    return command


def add_set(command: argparse.ArgumentParser) -> None:
    """`--set KEY=VALUE`."""
    command.add_argument(
        "--set", action="append", default=[], metavar="KEY=VALUE", dest="overrides",
        help="change a parameter, e.g. --set train.max_train_steps=200; may be given repeatedly; `sdxl-flows "
        "parameters` lists all",
    )  # fmt: skip


def add_preset(command: argparse.ArgumentParser) -> None:
    """`--preset NAME`."""
    command.add_argument(
        "--preset", metavar="NAME", help="parameters to begin with, under those of the file; see `sdxl-flows presets`"
    )


def add_flow(command: argparse.ArgumentParser) -> None:
    """`--flow`."""
    command.add_argument("--flow", action="store_true", help="run as its Prefect flow (same files, same ledger)")


def read_job(options: argparse.Namespace) -> JobConfig:
    """The job of `JOB.toml`, over `--preset` and under `--set`."""
    from sdxl_core.presets import under_job

    values = under_job(options.preset, read_toml(options.job))
    values = apply_overrides(values, options.overrides)
    return check(JobConfig, values, where=str(options.job), overrides=options.overrides)


def run_stage(config: Any, options: argparse.Namespace) -> None:
    """Run a stage's core function, or with `--flow` its flow, and print the result."""
    if getattr(options, "flow", False):
        flows_cli().run_stage(options.name, config, as_json=options.as_json)
        return
    from sdxl_core.progress import terminal_progress
    from sdxl_core.run_record import record_stage

    module, _, function = options.stage.function.partition(":")
    with terminal_progress() as progress:
        ref = getattr(import_module(module), function)(config, progress=progress)
    if options.stage.in_run_folder:
        record_stage(config.out, options.name, config, ref)
    print_result(ref, as_json=options.as_json)


def print_result(ref: Any, *, as_json: bool) -> None:
    """One line for people, or the reference as JSON."""
    import orjson

    from sdxl_core.refs import LatentSetRef, to_json
    from sdxl_core.summary import describe

    if as_json:
        print(orjson.dumps(to_json(ref), option=orjson.OPT_INDENT_2).decode())
        return
    if isinstance(ref, LatentSetRef):
        from sdxl_core.latents.report import bucket_histogram_text

        print(bucket_histogram_text(ref))
    print(describe(ref))


def flows_cli() -> Any:
    """`flows.cli`, imported only when a flow is asked for; our own `flows`, not somebody else's package.

    Raises: ConfigError: Prefect is not installed, or another package called flows or tasks hides ours.
    """
    home = Path(__file__).resolve().parents[2]
    for package in ("flows", "tasks"):
        found = import_module(package).__file__
        if found is None or Path(found).resolve().parent.parent != home:
            raise ConfigError(
                f"the Python package {package!r} at {found} hides the one of sdxl-flows in {home}. "
                f"Remove that folder from PYTHONPATH (or rename it) and run the command again."
            )
    try:
        return import_module("flows.cli")
    except ModuleNotFoundError as error:
        if error.name is None or error.name.split(".")[0] != "prefect":
            raise
        raise ConfigError(
            "this command runs a Prefect flow and Prefect is not installed here. Install it (pip install prefect "
            "'fastapi<0.151'), or use the stage commands without --flow: they need no Prefect."
        ) from error
