"""The commands that only read and translate: sd-scripts' command lines, parameters, presets."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

AddCommand = Callable[..., argparse.ArgumentParser]


def add_translations(commands: Any, add: AddCommand) -> None:
    """Args: add: makes a command of `commands`, with what all have in common."""
    imported = add(commands, "import-command", "sd-scripts' `accelerate launch … sdxl_train.py …` as our TOML", _import)
    imported.add_argument("file", type=Path, nargs="?", metavar="FILE", help="a text file with one command line in it")
    imported.add_argument("--out", type=Path, metavar="FILE.toml", help="write it there (default: print it)")
    imported.add_argument(
        "--root-map", action="append", default=[], metavar="FROM=TO",
        help="replace the beginning of its paths, e.g. H:/just_astolfo=/data/just_astolfo; may be given repeatedly",
    )  # fmt: skip
    imported.add_argument("--options", action="store_true", help="print what becomes of each of its options, and end")

    told = add(
        commands, "parameters", "the parameters of a job file: what each may be, its default, what it does", _parameters
    )
    told.add_argument("words", nargs="*", metavar="WORD", help="a section (train), or part of a name (rate, lr)")

    listed = add(commands, "presets", "the sets of parameters for --preset, or one of them as TOML", _presets)
    listed.add_argument("name", nargs="?", metavar="NAME", help="print this one")


def _import(options: argparse.Namespace) -> None:
    from sdxl_core.errors import ConfigError
    from sdxl_core.files import write_atomic
    from sdxl_core.sd_scripts import as_toml, import_command, options_markdown

    if options.options:
        print(options_markdown(), end="")
        return
    if options.file is None:
        raise ConfigError("sdxl-flows import-command: name the file that holds the command line.")
    imported = import_command(options.file, root_map=dict(pair.rpartition("=")[::2] for pair in options.root_map))
    text = as_toml(imported, source=options.file.name)
    if options.as_json:
        from dataclasses import asdict

        import orjson

        print(orjson.dumps(asdict(imported), option=orjson.OPT_INDENT_2).decode())
    elif options.out is None:
        print(text, end="")
    if options.out is not None:
        write_atomic(options.out, text.encode())
        print(
            f"{len(imported.mapped)} options carried over, {len(imported.not_mapped)} not (listed in the file, with "
            f"the reason) -> {options.out}",
            file=sys.stderr,
        )


def _parameters(options: argparse.Namespace) -> None:
    from dataclasses import asdict

    import orjson

    from sdxl_core.config import JobConfig
    from sdxl_core.configfile import similar_keys
    from sdxl_core.errors import ConfigError
    from sdxl_core.parameters import parameter_text, parameters

    everything = list(parameters(JobConfig))
    found = everything if not options.words else []
    for word in options.words:
        name = word.replace("-", "_")
        picked = [one for one in everything if one.name.startswith(f"{name}.")]
        near = [] if picked else similar_keys(name, [one.name for one in everything])
        found += picked or [one for one in everything if one.name in near or name in one.name.rpartition(".")[2]]
    if not found:
        raise ConfigError(f"sdxl-flows parameters: none has {' or '.join(options.words)} in its name.")
    if options.as_json:
        print(orjson.dumps([asdict(one) for one in found], option=orjson.OPT_INDENT_2).decode())
        return
    print("\n".join(parameter_text(one) for one in found))


def _presets(options: argparse.Namespace) -> None:
    import orjson

    from sdxl_core.presets import presets, read_preset

    if options.name is None:
        width = max(len(preset.name) for preset in presets())
        lines = [f"{preset.name:<{width}}  {preset.about}" for preset in presets()]
        names = {preset.name: preset.about for preset in presets()}
        print(orjson.dumps(names, option=orjson.OPT_INDENT_2).decode() if options.as_json else "\n".join(lines))
        return
    values = read_preset(options.name)
    text = next(preset.text for preset in presets() if preset.name == options.name)
    print(orjson.dumps(values, option=orjson.OPT_INDENT_2).decode() if options.as_json else text, end="")
