"""The commands about the service and about checkpoints' origins: up, status, down, lineage."""

from __future__ import annotations

import argparse
import os
import sys
from importlib import import_module
from pathlib import Path
from typing import Any

from sdxl_core.cli.common import add_command, flows_cli
from sdxl_core.errors import ConfigError
from sdxl_core.roots import ROOTS_VARIABLE


def add_service(commands: Any) -> None:
    """`up`, `status`, `down`."""
    up = add_command(commands, "up", "a Prefect server, every flow deployed, and a worker, until Ctrl-C", _up)
    up.add_argument("--host", default="127.0.0.1", help="address to listen on (default: 127.0.0.1)")
    up.add_argument("--port", type=_port, default=4200, help="(default: 4200)")
    up.add_argument("--detach", action="store_true", help="leave it running in the background")
    up.add_argument(
        "--database-url", default="", metavar="URL",
        help="postgresql://user:password@host:port/name, for several workers and long runs; left out: SQLite (the "
        "environment's PREFECT_SERVER_DATABASE_CONNECTION_URL does the same, and shows the password to no `ps`)",
    )  # fmt: skip
    up.add_argument(
        "--tensorboard-port",
        type=_port_or_none,
        default=6006,
        metavar="PORT",
        help="on 127.0.0.1; 0: none (default: 6006)",
    )
    up.add_argument(
        "--data-root", type=Path, action="append", default=[], metavar="DIR", dest="data_roots",
        help="runs may only name paths below this folder; may be given repeatedly (docs/security.md)",
    )  # fmt: skip
    add_command(commands, "status", "what `up` has running", _status)
    add_command(commands, "down", "end what `up` has started", lambda _: service().down())


def service() -> Any:
    """`flows.service.up`, imported only when asked for."""
    flows_cli()
    return import_module("flows.service.up")


def _status(options: argparse.Namespace) -> None:
    flows_cli()
    sys.exit(import_module("flows.service.status").status())


def _port(text: str) -> int:
    if not (text.isdecimal() and 1 <= int(text) <= 65535):
        raise argparse.ArgumentTypeError(f"{text!r} is no port: a whole number from 1 to 65535")
    return int(text)


def _port_or_none(text: str) -> int:
    return 0 if text == "0" else _port(text)


def _up(options: argparse.Namespace) -> None:
    for root in options.data_roots:
        if not root.is_dir():
            raise ConfigError(f"--data-root {root}: there is no such folder. Name one that holds data or models.")
    if options.data_roots:
        os.environ[ROOTS_VARIABLE] = os.pathsep.join(str(root.resolve()) for root in options.data_roots)
    service().up(
        host=options.host, port=options.port, detach=options.detach, curves_port=options.tensorboard_port,
        database_url=options.database_url,
    )  # fmt: skip


def add_lineage(commands: Any) -> None:
    """`lineage`."""
    lineage = add_command(commands, "lineage", "which pictures, tags, settings and code made a checkpoint", _lineage)
    lineage.add_argument("file", type=Path, metavar="MODEL", help="a .safetensors file, or a diffusers folder")
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
