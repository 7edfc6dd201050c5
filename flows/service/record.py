"""Where a running service is noted: one small file that names its supervisor, so that `status` and `down` find it."""

from __future__ import annotations

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

import orjson

from sdxl_core.errors import ConfigError
from sdxl_core.files import write_atomic
from sdxl_core.processes import process_start


@dataclass(frozen=True, slots=True, kw_only=True)
class ServiceRecord:
    """A started service. `pid`, `started`: the supervisor's identity (a reused pid has another start).

    `curves`: where its TensorBoard is, "" without one.
    """

    pid: int
    started: str
    url: str
    ready: bool
    curves: str = ""

    def is_alive(self) -> bool:
        return process_start(self.pid) == self.started


def service_folder() -> Path:
    """Where logs and the record live: $SDXL_FLOWS_HOME, else ~/.local/state/sdxl-flows."""
    return Path(os.environ.get("SDXL_FLOWS_HOME") or Path.home() / ".local" / "state" / "sdxl-flows")


def read_record() -> ServiceRecord | None:
    """The record of a service that is alive, else None."""
    try:
        record = ServiceRecord(**orjson.loads((service_folder() / "service.json").read_bytes()))
    except (FileNotFoundError, orjson.JSONDecodeError, TypeError):
        return None
    return record if record.is_alive() else None


def write_record(*, url: str, ready: bool, curves: str = "") -> None:
    """Note this process as the supervisor."""
    pid = os.getpid()
    record = ServiceRecord(pid=pid, started=process_start(pid) or "", url=url, ready=ready, curves=curves)
    write_atomic(service_folder() / "service.json", orjson.dumps(asdict(record)))


def remove_record() -> None:
    (service_folder() / "service.json").unlink(missing_ok=True)


@contextmanager
def claimed_folder() -> Iterator[None]:
    """Only one service at a time. Raises: ConfigError: another is there, or the folder cannot be written."""
    folder = service_folder()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = os.open(folder / "lock", os.O_WRONLY | os.O_CREAT)
    except OSError as error:
        raise ConfigError(
            f"{folder}: cannot be written ({error.strerror}). Its logs go there; set SDXL_FLOWS_HOME to a folder that "
            f"can be."
        ) from error
    try:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise ConfigError(
                f"another `sdxl-flows up` holds {folder}: it is starting or ending just now. `sdxl-flows status` tells."
            ) from error
        yield
    finally:
        os.close(lock)
