"""The `sdxl-flows` command. Everything heavy is imported by the command that needs it; Prefect only for a flow."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from sdxl_core import __version__
from sdxl_core.cli.common import add_command, add_preset, add_set, flows_cli, print_result, read_job
from sdxl_core.cli.options import dashes
from sdxl_core.cli.service import add_lineage, add_service
from sdxl_core.cli.stages import STAGES, add_stages
from sdxl_core.cli.training import add_plan, add_show_captions
from sdxl_core.cli.translate import add_translations
from sdxl_core.config import JobConfig
from sdxl_core.errors import SdxlFlowsError

__all__ = ["STAGES", "build_parser", "main", "print_result"]


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
    except OSError as error:
        if error.filename is None:
            raise
        print(
            f"\nerror: {error.filename2 or error.filename}: {error.strerror}. What was finished is kept; once this is "
            f"mended, the same command continues there.",
            file=sys.stderr,
        )
        sys.exit(1)


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

    demo = add_command(commands, "demo", "the whole path on drawn sample pictures, CPU, under 3 minutes", _demo)
    demo.add_argument("--out", type=Path, default=Path("out/demo"), metavar="DIR", help="(default: out/demo)")

    run = add_command(commands, "run", "the whole path on your data, as a Prefect flow", _run)
    run.add_argument("job", type=Path, metavar="JOB.toml")
    add_set(run)
    add_preset(run)

    add_stages(commands)
    add_translations(commands, add_command)
    add_plan(commands)
    add_lineage(commands)
    add_show_captions(commands)
    add_service(commands)
    add_command(
        commands, "doctor", "what is installed, which GPUs, does bitsandbytes work here, what to do if not", _doctor
    )
    return parser


def _demo(options: argparse.Namespace) -> None:
    from sdxl_core.demo import demo_job, draw_samples

    source = options.out / "pictures"
    is_new = draw_samples(source)
    if not options.as_json:
        print(f"drew 51 sample pictures -> {source}" if is_new else f"sample pictures are there: {source}", flush=True)
    _run_job(demo_job(source=source, out=options.out), options)


def _run(options: argparse.Namespace) -> None:
    _run_job(read_job(options), options)


def _run_job(job: JobConfig, options: argparse.Namespace) -> None:
    flows_cli().run_job(job, as_json=options.as_json)


def _doctor(options: argparse.Namespace) -> None:
    from sdxl_core.doctor import run_doctor

    sys.exit(run_doctor(as_json=options.as_json))
