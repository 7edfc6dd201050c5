"""The processes of a run: the flow's, its slots', its trainer's; found by what Prefect puts into their environment."""

import os
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path
from typing import Any
from uuid import UUID

ROLES = {  # what the command line of each says
    "flow": (b"prefect.engine", b"flow_engine"),
    "slot": (b"multiprocessing.spawn",),
    "trainer": (b"\0sdxl_core.training\0",),
    "worker": (b"worker\0start",),
    "server": (b"flows.server\0start", b"flows.server:create_app"),
}


def with_environment(text: bytes) -> set[int]:
    """Processes, zombies not counted, whose environment holds this text."""
    found = set()
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit() and int(entry.name) != os.getpid():
            try:
                is_one = text in (entry / "environ").read_bytes()
                if is_one and (entry / "stat").read_text().rpartition(")")[2].split()[0] not in "ZX":
                    found.add(int(entry.name))
            except (FileNotFoundError, PermissionError, ProcessLookupError):
                continue
    return found


def processes_of(run: UUID) -> set[int]:
    """The flow's process, and the slots and trainers that it started."""
    return with_environment(str(run).encode())


def in_role(role: str, pids: set[int]) -> set[int]:
    """Those of the processes that are what `ROLES` calls so. The launcher of a trainer is not the trainer."""
    return {pid for pid in pids if _is(role, _command(pid))}


def _is(role: str, command: bytes) -> bool:
    return any(words in command for words in ROLES[role]) and b"accelerate.commands.launch" not in command


def _command(pid: int) -> bytes:
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes()
    except (FileNotFoundError, ProcessLookupError):
        return b""


def listening(pids: Iterable[int]) -> set[str]:
    """The addresses that these processes accept connections on."""
    import psutil

    found = set()
    for pid in pids:
        with suppress(psutil.NoSuchProcess):
            connections: list[Any] = psutil.Process(pid).net_connections("inet")
            found |= {c.laddr.ip.removeprefix("::ffff:") for c in connections if c.status == psutil.CONN_LISTEN}
    return found
