"""Prefect's temporary server, out of reach of the signals that are meant for the run.

A terminal's Ctrl-C, `timeout` and service managers signal the whole process group. Prefect starts its temporary server
in ours, so that it would die first and the run would wait for a dead server for ever. Here it has a session of its own,
and ends with the process that started it, however that ends.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from functools import partial

import prefect
from prefect.server.api.server import SubprocessASGIServer
from prefect.settings import PREFECT_API_URL, PREFECT_SERVER_EPHEMERAL_ENABLED, get_current_settings

from sdxl_core.processes import ending_with_parent


def start_temporary_server() -> None:
    """Start it where Prefect would, which finds it running then; nothing where a server is configured."""
    if PREFECT_API_URL.value() or not PREFECT_SERVER_EPHEMERAL_ENABLED.value():
        return
    server = SubprocessASGIServer()
    vars(server)["_run_uvicorn_command"] = partial(_serve, server)
    server.start()


def _serve(server: SubprocessASGIServer) -> subprocess.Popen[bytes]:
    """The command Prefect 3.8 uses, with our server."""
    command = [sys.executable, "-m", "uvicorn", "--app-dir", str(prefect.__module_path__.parent), "--factory"]
    command += ["flows.server:create_app", "--host", "127.0.0.1", "--port", str(server.port)]
    command += ["--log-level", "error", "--lifespan", "on"]
    environment = {
        **os.environ,
        "PREFECT_UI_ENABLED": "0",
        "PREFECT__SERVER_EPHEMERAL": "1",
        "PREFECT__SERVER_FINAL": "1",
        **get_current_settings().to_environment_variables(exclude_unset=True),
    }
    return subprocess.Popen(
        command, env=environment, start_new_session=True, preexec_fn=ending_with_parent(signal.SIGTERM)
    )
