"""`sdxl-flows up` in a home of its own, and the command line over it."""

import os
import socket
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]


class Service:
    """The command line over a service of its own."""

    def __init__(self, folder: Path) -> None:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port = probe.getsockname()[1]
        self.folder = folder
        self.environment = os.environ | {
            "PREFECT_HOME": str(folder / "prefect"),
            "SDXL_FLOWS_HOME": str(folder / "home"),
            "PREFECT_API_URL": f"http://127.0.0.1:{self.port}/api",
        }

    def command(self, *argv: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "sdxl_core.cli", *argv]
        return subprocess.run(
            command, env=self.environment, cwd=ROOT, capture_output=True, text=True, timeout=240, check=False
        )

    def prefect(self, *argv: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "prefect", *argv]
        return subprocess.run(
            command, env=self.environment, cwd=ROOT, capture_output=True, text=True, timeout=240, check=False
        )

    def processes(self) -> list[int]:
        """Every process that was started with this service's home."""
        mark = f"SDXL_FLOWS_HOME={self.folder / 'home'}".encode()
        found = []
        for entry in Path("/proc").iterdir():
            if entry.name.isdigit() and int(entry.name) != os.getpid():
                try:
                    if mark in (entry / "environ").read_bytes():
                        found.append(int(entry.name))
                except (FileNotFoundError, PermissionError, ProcessLookupError):
                    continue
        return found
