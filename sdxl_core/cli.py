"""The `sdxl-flows` command. Everything heavy is imported by the command that needs it; Prefect only for a flow."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from importlib import import_module
from pathlib import Path
from typing import Any, NamedTuple

from pydantic import BaseModel

from sdxl_core import __version__
from sdxl_core.catalog.config import CatalogConfig
from sdxl_core.cli_models import add_translations
from sdxl_core.cli_options import add_options, collect_options, dashes
from sdxl_core.config import (
    CacheLatentsConfig,
    CompactLatentsConfig,
    ConvertLatentsConfig,
    ImportLatentsConfig,
    JobConfig,
    MergeJsonConfig,
    MergeTagsConfig,
    PackTarsConfig,
    RemoveLatentsConfig,
    StatisticsConfig,
    SubsetConfig,
    TrainConfig,
    TrainOptions,
    VerifyLatentsConfig,
)
from sdxl_core.config.convert import ConvertModelConfig
from sdxl_core.configfile import apply_overrides, check, read_toml
from sdxl_core.errors import ConfigError, SdxlFlowsError
from sdxl_core.roots import ROOTS_VARIABLE


class Stage(NamedTuple):
    """A stage command: its config, the core function that does it, whether `out` is a run folder, its help line."""

    config: type[BaseModel]
    function: str
    in_run_folder: bool
    help: str


STAGES = {
    "catalog": Stage(
        CatalogConfig,
        "sdxl_core.catalog.build:build_catalog",
        False,
        "describe a collection in one memory-mapped table",
    ),
    "subset": Stage(SubsetConfig, "sdxl_core.subset.stage:subset", False, "pick pictures by tags and copy them"),
    "statistics": Stage(
        StatisticsConfig,
        "sdxl_core.statistics.stage:statistics",
        False,
        "what the pictures that a query picks hold",
    ),
    "merge-tags": Stage(
        MergeTagsConfig, "sdxl_core.merge.plan:merge_tags", False, "tags and captions of a folder into one JSON"
    ),
    "merge-json": Stage(MergeJsonConfig, "sdxl_core.merge.jsons:merge_jsons", False, "several metadata JSONs into one"),
    "cache-latents": Stage(
        CacheLatentsConfig, "sdxl_core.latents.cache:cache_latents", True, "encode pictures into bucketed .npz latents"
    ),
    "train": Stage(
        TrainConfig, "sdxl_core.training.launch:launch_training", True, "fine-tune SDXL on the cached latents"
    ),
    "convert-model": Stage(
        ConvertModelConfig,
        "sdxl_core.models.convert:convert_model",
        False,
        "an SDXL model as one file, as a diffusers folder, or in another precision",
    ),
}
SET_STAGES = {
    "verify": Stage(
        VerifyLatentsConfig,
        "sdxl_core.latents.verify:verify_latents",
        False,
        "read every byte of a latent set; with --repair encode again exactly what is bad",
    ),
    "remove-latents": Stage(
        RemoveLatentsConfig,
        "sdxl_core.latents.verify:remove_latents",
        False,
        "take the latents of some pictures out of a latent set",
    ),
}
SET_STAGES |= {
    "convert-latents": Stage(
        ConvertLatentsConfig,
        "sdxl_core.latents.convert.layouts:convert_latents",
        False,
        "a latent set in the other layout, per_image or packed; nothing is encoded again",
    ),
    "import-latents": Stage(
        ImportLatentsConfig,
        "sdxl_core.latents.convert.importing:import_latents",
        False,
        "take an sd-scripts cache over where it lies: check every file, record it, change none",
    ),
    "compact-latents": Stage(
        CompactLatentsConfig,
        "sdxl_core.latents.convert.compact:compact_latents",
        False,
        "merge the small files of a packed set, and drop removed rows",
    ),
    "pack-tars": Stage(
        PackTarsConfig,
        "sdxl_core.latents.convert.tars:pack_tars",
        False,
        "per-image files into tars with a JSON index each, as large collections are shared",
    ),
}
ATTENTION_WORDS = ("xformers", "diffusers-xformers", "mem-eff-attn", "sdpa")


def main(argv: Sequence[str] | None = None) -> None:
    """Entry point: exit status 0 done, 1 the job failed, 2 a wrong call or config, 130 interrupted."""
    options = build_parser().parse_args(dashes(sys.argv[1:] if argv is None else argv))
    try:
        options.run(options)
    except SdxlFlowsError as error:
        print(f"\nerror: {error}", file=sys.stderr)
        sys.exit(error.exit_status)
    except KeyboardInterrupt:
        print("\ninterrupted: what was finished is kept; the same command continues there.", file=sys.stderr)
        sys.exit(130)
    except BrokenPipeError:  # `sdxl-flows … | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def build_parser() -> argparse.ArgumentParser:
    """The whole command line."""
    parser = argparse.ArgumentParser(
        prog="sdxl-flows",
        description="From pictures with tags to a fine-tuned SDXL checkpoint.",
        epilog="Every parameter can also stand in a job file (docs/job_file.md) and in the browser form.",
        allow_abbrev=False,
    )
    parser.add_argument("--version", action="version", version=f"sdxl-flows {__version__}")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)

    demo = _command(commands, "demo", "the whole path on drawn sample pictures, CPU, under 3 minutes", _demo)
    demo.add_argument("--out", type=Path, default=Path("out/demo"), metavar="DIR", help="(default: out/demo)")

    run = _command(commands, "run", "the whole path on your data, as a Prefect flow", _run)
    run.add_argument("job", type=Path, metavar="JOB.toml")
    _add_set(run)
    _add_preset(run)

    for name, stage in STAGES.items():
        if name == "train":
            _add_train(commands, stage)
            continue
        if name == "catalog":
            _add_catalog(commands, stage)
            continue
        command = _command(commands, name, stage.help, _stage, stage=stage, name=name)
        if name != "convert-model":  # minutes at most, nothing to resume
            _add_flow(command)
        add_options(command, stage.config, all_optional=name == "subset")  # --explain needs no --out
        if name == "subset":
            command.add_argument(
                "--explain", action="store_true", help="print how many pictures each term of the query finds, and end"
            )

    for name, stage in SET_STAGES.items():
        command = _command(commands, name, stage.help, _on_a_set, stage=stage, name=name)
        if name == "verify":
            _add_flow(command)
        command.add_argument("path", type=Path, metavar="DIR", help=stage.config.model_fields["path"].description)
        add_options(command, stage.config, leave_out=("path",))
    add_translations(commands, _command)
    _add_plan(commands)
    _add_lineage(commands)
    _add_show_captions(commands)
    _add_service(commands)
    _command(
        commands, "doctor", "what is installed, which GPUs, does bitsandbytes work here, what to do if not", _doctor
    )
    return parser


def _add_plan(commands: Any) -> None:
    plan = _command(commands, "plan", "the memory a training run needs, by component, before anything is loaded", _plan)
    plan.add_argument("job", type=Path, nargs="?", metavar="JOB.toml", help="a job file")
    plan.add_argument("--config", type=Path, metavar="TRAIN.toml", help="training parameters only")
    plan.add_argument("--card-gb", type=float, metavar="GB", help="refuse what does not fit a card of this size (GiB)")
    plan.add_argument("--width-px", type=int, default=1024, metavar="N", help="of the largest bucket (default: 1024)")
    plan.add_argument("--height-px", type=int, default=1024, metavar="N", help="(default: 1024)")
    _add_set(plan)
    _add_preset(plan)
    export = _command(commands, "export", "a saved training state as a model file", _export)
    export.add_argument("state", type=Path, metavar="STATE", help="a folder such as OUT/state/step-00001000")
    export.add_argument("--out", type=Path, required=True, metavar="FILE.safetensors")
    export.add_argument("--ema", action="store_true", help="the average of the weights in place of the weights")


def _plan(options: argparse.Namespace) -> None:
    from sdxl_core.training.memory_plan import plan_text

    if options.job is not None:
        train = _read_job(options).train
    else:
        from sdxl_core.presets import under_training

        values = under_training(options.preset, {} if options.config is None else read_toml(options.config))
        values = {key: value for key, value in values.items() if key in TrainOptions.model_fields}
        train = check(TrainOptions, apply_overrides(values, options.overrides), where="sdxl-flows plan")
    card_bytes = None if options.card_gb is None else int(options.card_gb * 2**30)
    print(plan_text(train, width_px=options.width_px, height_px=options.height_px, card_bytes=card_bytes))


def _export(options: argparse.Namespace) -> None:
    from sdxl_core.training.parts import save_checkpoint
    from sdxl_core.training.state import read_generation

    generation = read_generation(options.state)
    file = save_checkpoint(generation, path=options.out, weights="ema" if options.ema else "weights")
    print(f"step {generation.step} -> {file.path} ({file.num_bytes / 1e6:.1f} MB)")


def _add_lineage(commands: Any) -> None:
    lineage = _command(commands, "lineage", "which pictures, tags, settings and code made a checkpoint", _lineage)
    lineage.add_argument("file", type=Path, metavar="FILE.safetensors")
    lineage.add_argument("--run", type=Path, metavar="DIR", dest="folder", help="the run's folder, if it was moved")
    lineage.add_argument("--images", action="store_true", help="print every picture with its texts, a JSON line each")
    lineage.add_argument("--html", type=Path, metavar="PAGE.html", help="write it as one self-contained page")


def _lineage(options: argparse.Namespace) -> None:
    import orjson

    from sdxl_core.lineage import trace
    from sdxl_core.lineage.show import lineage_text, write_lineage_page
    from sdxl_core.refs import to_json

    lineage = trace(options.file, run=options.folder)
    if options.images:
        for image in lineage.images():
            print(orjson.dumps(image).decode())
        return
    print(
        orjson.dumps(to_json(lineage), option=orjson.OPT_INDENT_2).decode()
        if options.as_json
        else lineage_text(lineage)
    )
    if options.html is not None:
        print(f"look: {write_lineage_page(lineage, options.html)}", file=sys.stderr)


def _add_service(commands: Any) -> None:
    up = _command(commands, "up", "a Prefect server, every flow deployed, and a worker, until Ctrl-C", _up)
    up.add_argument("--host", default="127.0.0.1", help="address to listen on (default: 127.0.0.1)")
    up.add_argument("--port", type=int, default=4200, help="(default: 4200)")
    up.add_argument("--detach", action="store_true", help="leave it running in the background")
    up.add_argument(
        "--data-root", type=Path, action="append", default=[], metavar="DIR", dest="data_roots",
        help="runs may only name paths below this folder; may be given repeatedly (docs/security.md)",
    )  # fmt: skip
    _command(commands, "status", "what `up` has running", lambda _: sys.exit(service().status()))
    _command(commands, "down", "end what `up` has started", lambda _: service().down())


def _command(commands: Any, word: str, text: str, run: Any, **defaults: Any) -> argparse.ArgumentParser:
    command: argparse.ArgumentParser = commands.add_parser(word, help=text, description=text, allow_abbrev=False)
    command.set_defaults(run=run, **defaults)
    command.add_argument("--json", action="store_true", dest="as_json", help="print the result as JSON on stdout")
    return command


def _add_set(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "--set", action="append", default=[], metavar="KEY=VALUE", dest="overrides",
        help="change a parameter, e.g. --set train.max_train_steps=200; may be given repeatedly",
    )  # fmt: skip


def _add_preset(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "--preset", metavar="NAME", help="parameters to begin with, under those of the file; see `sdxl-flows presets`"
    )


def _add_flow(command: argparse.ArgumentParser) -> None:
    command.add_argument("--flow", action="store_true", help="run as its Prefect flow (same files, same ledger)")


def _add_catalog(commands: Any, stage: Stage) -> None:
    command = _command(commands, "catalog", stage.help, _catalog, stage=stage, name="catalog")
    _add_flow(command)
    command.add_argument("--config", type=Path, metavar="CATALOG.toml", help="[[sources]] with all their parameters")
    add_options(command, stage.config, all_optional=True)


def _catalog(options: argparse.Namespace) -> None:
    """Options win over the file."""
    values = {} if options.config is None else read_toml(options.config)
    values |= collect_options(options, CatalogConfig)
    where = "sdxl-flows catalog" if options.config is None else str(options.config)
    _run_stage(check(CatalogConfig, values, where=where), options)


def _add_train(commands: Any, stage: Stage) -> None:
    command = _command(commands, "train", stage.help, _train, stage=stage, name="train")
    _add_flow(command)
    _add_training_file(command)
    command.add_argument(
        "--show-captions", type=int, metavar="N", help="print N captions as training tokenises them, and end"
    )
    for word in ATTENTION_WORDS:
        command.add_argument(f"--{word}", action="store_true", help="accepted: attention is PyTorch's SDPA in any case")


def _add_show_captions(commands: Any) -> None:
    command = _command(
        commands, "show-captions", "print captions exactly as training tokenises them, and what is cut", _show_captions
    )
    _add_training_file(command)
    command.add_argument("--num", type=int, default=50, metavar="N", help="how many captions (default: 50)")


def _add_training_file(command: argparse.ArgumentParser) -> None:
    command.add_argument("job", type=Path, nargs="?", metavar="JOB.toml", help="a job file: trains what the job cached")
    command.add_argument("--config", type=Path, metavar="TRAIN.toml", help="training parameters only")
    _add_set(command)
    _add_preset(command)


def _demo(options: argparse.Namespace) -> None:
    from sdxl_core.demo import demo_job, draw_samples

    source = options.out / "pictures"
    num_drawn = draw_samples(source)
    if not options.as_json:
        print(f"drew {num_drawn} sample pictures -> {source}", flush=True)
    _run_job(demo_job(source=source, out=options.out), options)


def _run(options: argparse.Namespace) -> None:
    _run_job(_read_job(options), options)


def _read_job(options: argparse.Namespace) -> JobConfig:
    from sdxl_core.presets import under_job

    values = under_job(options.preset, read_toml(options.job))
    return check(JobConfig, apply_overrides(values, options.overrides), where=str(options.job))


def _run_job(job: JobConfig, options: argparse.Namespace) -> None:
    flows_cli().run_job(job, as_json=options.as_json)


def _stage(options: argparse.Namespace) -> None:
    values = collect_options(options, options.stage.config)
    if options.name == "subset" and options.explain:
        _explain(values)
        return
    _run_stage(check(options.stage.config, values, where=f"sdxl-flows {options.name}"), options)


def _explain(values: dict[str, Any]) -> None:
    """Count the terms of a query; only of a folder, and where `out` is named, its catalog is left beside `out`."""
    from tempfile import TemporaryDirectory

    from sdxl_core.progress import terminal_progress
    from sdxl_core.subset.stage import explain_query

    with TemporaryDirectory(prefix="sdxl-flows-") as folder, terminal_progress() as progress:
        values.setdefault("out", str(Path(folder) / "subset"))
        config = check(SubsetConfig, values, where="sdxl-flows subset --explain")
        print(explain_query(config, progress=progress))


def _on_a_set(options: argparse.Namespace) -> None:
    values = collect_options(options, options.stage.config)
    options.flow = getattr(options, "flow", False)
    _run_stage(check(options.stage.config, values, where=f"sdxl-flows {options.name}"), options)


def _train(options: argparse.Namespace) -> None:
    for word in ATTENTION_WORDS:
        if getattr(options, word.replace("-", "_")):
            print(f"--{word}: noted. Attention is PyTorch's scaled_dot_product_attention, which picks the fastest "
                  f"kernel for the card by itself; nothing else needs to be installed.", file=sys.stderr)  # fmt: skip
    config = _train_config(options, command="train")
    if options.show_captions is not None:
        _print_captions(config, options.show_captions, as_json=options.as_json)
        return
    _run_stage(config, options)


def _train_config(options: argparse.Namespace, *, command: str) -> TrainConfig:
    """What a job file or a file of training parameters says."""
    if (options.job is None) == (options.config is None):
        raise ConfigError(f"sdxl-flows {command}: name either a job file ({command} JOB.toml) or --config TRAIN.toml.")
    if options.config is None:
        return _read_job(options).train_config()
    from sdxl_core.presets import under_training

    values = apply_overrides(under_training(options.preset, read_toml(options.config)), options.overrides)
    return check(TrainConfig, values, where=str(options.config))


def _show_captions(options: argparse.Namespace) -> None:
    _print_captions(_train_config(options, command="show-captions"), options.num, as_json=options.as_json)


def _print_captions(config: TrainConfig, num: int, *, as_json: bool) -> None:
    """Text for people, or one JSON object a line."""
    import orjson

    from sdxl_core.training.show_captions import caption_lines, shown_captions

    captions = shown_captions(config, num)
    for line in (orjson.dumps(c).decode() for c in captions) if as_json else caption_lines(captions, config):
        print(line)


def _run_stage(config: Any, options: argparse.Namespace) -> None:
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
    home = Path(__file__).resolve().parent.parent
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


def service() -> Any:
    """`flows.service.up`, imported only when asked for."""
    flows_cli()
    return import_module("flows.service.up")


def _up(options: argparse.Namespace) -> None:
    if options.data_roots:
        os.environ[ROOTS_VARIABLE] = os.pathsep.join(str(root.resolve()) for root in options.data_roots)
    service().up(host=options.host, port=options.port, detach=options.detach)


def _doctor(options: argparse.Namespace) -> None:
    from sdxl_core.doctor import run_doctor

    sys.exit(run_doctor(as_json=options.as_json))


if __name__ == "__main__":
    main()
