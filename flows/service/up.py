"""Start the server, deploy every flow, keep a worker alive, and end all of it together."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from types import FrameType

from httpx import HTTPError
from prefect.settings import (
    PREFECT_API_AUTH_STRING,
    PREFECT_SERVER_API_AUTH_STRING,
)

from flows.service.deploy import POOL, ROOT, deploy, is_healthy, wait_for_runs
from flows.service.record import claimed_folder, read_record, remove_record, service_folder, write_record
from sdxl_core.errors import ConfigError, SdxlFlowsError
from sdxl_core.processes import end_group, ending_with_parent
from tasks.curves import CURVES_FOLDER, CURVES_URL

START_TIMEOUT_S = 180.0
WORKER_GRACE_S = 20.0
LONG_LIFE_S = 600.0  # a child that lived so long did not end because it cannot start
DATABASE_VARIABLE = "PREFECT_SERVER_DATABASE_CONNECTION_URL"
SERVER = ("-m", "flows.server", "start")
WORKER = ("-m", "prefect", "worker", "start", "--pool", POOL, "--type", "process", "--install-policy", "never")
TENSORBOARD = ("-m", "tensorboard.main", "--host", "127.0.0.1", "--reload_interval", "10")
LOOPBACK = ("127.0.0.1", "localhost")
ANY_ADDRESS = "0.0.0.0"
DOWN_WITHIN_S = 90.0  # server, worker and TensorBoard have WORKER_GRACE_S each


def up(*, host: str, port: int, detach: bool, curves_port: int, database_url: str) -> None:
    """Run the service until Ctrl-C, or leave it running (`detach`).

    Args:   curves_port: of TensorBoard, on loopback; 0: none.
            database_url: of the server's database; "": as the environment says, else SQLite in $PREFECT_HOME.
    Raises: ConfigError: it runs already, the port is taken, the host would expose it without a password, or the
            database's address cannot be right; its folder cannot be written.
    """
    if database_url:
        os.environ[DATABASE_VARIABLE] = connection_url(database_url)
    running = read_record()
    if running is not None:
        raise ConfigError(f"it runs already: {running.url} (process {running.pid}). `sdxl-flows down` ends it.")
    _check_password(host)
    reason = _why_not_free(host, port)
    if reason:
        raise ConfigError(f"port {port} on {host} cannot be used: {reason}. Choose another --port.")
    with claimed_folder():
        if not detach:
            _supervise(host, port, curves_port)
    if detach:
        _detach(host, port, curves_port)


def _check_password(host: str) -> None:
    """Raises: ConfigError: others could reach the server and it asks for none, or the worker would not know it."""
    asked, known = PREFECT_SERVER_API_AUTH_STRING.value(), PREFECT_API_AUTH_STRING.value()
    if host not in LOOPBACK and not asked:
        raise ConfigError(
            f"--host {host} would let anyone on the network start jobs here. Set PREFECT_SERVER_API_AUTH_STRING and "
            f"PREFECT_API_AUTH_STRING to 'user:password' first, or keep 127.0.0.1 and use an SSH tunnel."
        )
    if asked and asked != known:
        raise ConfigError(
            "PREFECT_SERVER_API_AUTH_STRING is set, and PREFECT_API_AUTH_STRING is not the same: the worker would not "
            "be let in. Set both to the same 'user:password'."
        )


def _why_not_free(host: str, port: int) -> str:
    """What the system says against listening there, "" where nothing does."""
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError as error:
            return error.strerror or str(error)
    return ""


def connection_url(text: str) -> str:
    """A database's address as Prefect wants it: with the driver's name.   Raises: ConfigError: neither of the two."""
    scheme, separator, rest = text.partition("://")
    drivers = {
        "postgres": "postgresql+asyncpg",
        "postgresql": "postgresql+asyncpg",
        "postgresql+asyncpg": "postgresql+asyncpg",
        "sqlite": "sqlite+aiosqlite",
        "sqlite+aiosqlite": "sqlite+aiosqlite",
    }
    if not separator or scheme not in drivers:
        raise ConfigError(
            f"--database-url: {scheme}:// is no database that Prefect has. Write "
            f"postgresql://user:password@host:5432/name, or leave it out for SQLite."
        )
    return f"{drivers[scheme]}://{rest}"


def _detach(host: str, port: int, curves_port: int) -> None:
    command = [sys.executable, "-m", "sdxl_core.cli", "up", "--host", host, "--port", str(port)]
    command += ["--tensorboard-port", str(curves_port)]
    log = service_folder() / "up.log"
    with open(log, "wb") as output:
        child = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=output, stderr=output, start_new_session=True
        )
    while child.poll() is None:
        record = read_record()
        if record is not None and record.ready:
            print(f"running in the background: {record.url}   (sdxl-flows status, sdxl-flows down)")
            print(f"logs: {service_folder()}/*.log" + (f"   curves: {record.curves}" if record.curves else ""))
            return
        time.sleep(0.5)
    raise SdxlFlowsError(f"the service did not start. Its last words:\n{_tail(log)}")


def _supervise(host: str, port: int, curves_port: int) -> None:
    url = f"http://{LOOPBACK[0] if host == ANY_ADDRESS else host}:{port}"
    seen_from_here = host in LOOPBACK  # else a browser elsewhere asks the address that it got the page from
    elsewhere = f"; from elsewhere: http://{socket.gethostname()}:{port}/deployments" if host == ANY_ADDRESS else ""
    environment = os.environ | {
        "PREFECT_API_URL": f"{url}/api",
        "PREFECT_UI_API_URL": f"{url}/api" if seen_from_here else "/api",
    }
    signal.signal(signal.SIGTERM, _interrupt)
    if signal.getsignal(signal.SIGHUP) != signal.SIG_IGN:  # nohup's
        signal.signal(signal.SIGHUP, _interrupt)
    write_record(url=url, ready=False)
    server_command = [*SERVER, "--host", host, "--port", str(port)]
    try:
        with ExitStack() as children:
            print(f"starting the Prefect server on {url} …", flush=True)
            server = children.enter_context(_child("server", server_command, environment))
            _wait_healthy(url, server)
            print("deploying the flows …", flush=True)
            deploy(url, environment)
            print("starting a worker …", flush=True)
            environment |= _curves_environment(curves_port)
            supervised = [server, children.enter_context(_child("worker", list(WORKER), environment))]
            if CURVES_URL in environment:
                command = [*TENSORBOARD, "--port", str(curves_port), "--logdir", environment[CURVES_FOLDER]]
                supervised.append(children.enter_context(_child("tensorboard", command, environment)))
            write_record(url=url, ready=True, curves=environment.get(CURVES_URL, ""))
            print(f"\n  open {url}/deployments{elsewhere}   (Ctrl-C ends it all)", flush=True)
            print(f"  logs: {service_folder()}/*.log", flush=True)
            if CURVES_URL in environment:
                print(f"  curves of what is trained: {environment[CURVES_URL]}", flush=True)
            _keep_alive(supervised, url)
    except KeyboardInterrupt:
        print("\nended: server and worker are down; runs continue when they are started again.")
    finally:
        remove_record()


def _curves_environment(port: int) -> dict[str, str]:
    """What tells runs where their curves are shown; {} where TensorBoard is not wanted or its port is taken."""
    if not port:
        return {}
    reason = _why_not_free(LOOPBACK[0], port)
    if reason:
        print(f"port {port} cannot be used ({reason}): no TensorBoard. Choose another --tensorboard-port.", flush=True)
        return {}
    folder = service_folder() / "tensorboard"
    folder.mkdir(parents=True, exist_ok=True)
    return {CURVES_URL: f"http://{LOOPBACK[0]}:{port}", CURVES_FOLDER: str(folder)}


def _interrupt(number: int, frame: FrameType | None) -> None:
    raise KeyboardInterrupt


class Child:
    """A supervised process; `process` is replaced when it has died and was started again."""

    def __init__(self, name: str, command: list[str], environment: dict[str, str]) -> None:
        self.name, self._command, self._environment = name, command, environment
        self.process = self.start()

    def start(self) -> subprocess.Popen[bytes]:
        self.started_s = time.monotonic()
        log = service_folder() / f"{self.name}.log"
        with open(log, "ab") as output:  # a file, never a pipe: the server dies of a pipe that nobody reads
            self.process = subprocess.Popen(
                [sys.executable, *self._command],
                cwd=ROOT,
                env=self._environment,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                start_new_session=True,
                preexec_fn=ending_with_parent(signal.SIGTERM),
            )
        return self.process


@contextmanager
def _child(name: str, command: list[str], environment: dict[str, str]) -> Iterator[Child]:
    child = Child(name, command, environment)
    try:
        yield child
    finally:
        end_group(child.process, grace_s=WORKER_GRACE_S)


def _wait_healthy(url: str, server: Child) -> None:
    deadline = time.monotonic() + START_TIMEOUT_S
    while time.monotonic() < deadline:
        if server.process.poll() is not None:
            raise SdxlFlowsError(
                f"the Prefect server ended at once. Its log says:\n{_tail(service_folder() / 'server.log')}"
            )
        if is_healthy(url):
            return
        time.sleep(0.5)
    raise SdxlFlowsError(
        f"the Prefect server did not answer within {START_TIMEOUT_S:.0f} s; see {service_folder()}/server.log"
    )


def _keep_alive(children: list[Child], url: str) -> None:
    """Start a child again when it has ended, after a pause that doubles from 1 s to 60 s while it ends soon."""
    pause_s = dict.fromkeys((child.name for child in children), 1.0)
    due: dict[str, float] = {}  # those that have ended: when they are started again
    has_new = False  # server or worker: both may have lost what was at work
    while True:
        time.sleep(0.5)
        for child in children:
            name, status, now = child.name, child.process.poll(), time.monotonic()
            if status is None:
                continue
            if name not in due:
                if now - child.started_s > LONG_LIFE_S:
                    pause_s[name] = 1.0
                due[name] = now + pause_s[name]
                print(f"the {name} ended ({status}); starting it again in {pause_s[name]:.0f} s", flush=True)
            elif now >= due[name]:
                del due[name]
                pause_s[name] = min(60.0, 2 * pause_s[name])
                child.start()
                has_new |= name in ("server", "worker")
        if has_new and is_healthy(url):
            with suppress(HTTPError):  # it has ended again: the next one is told
                wait_for_runs(url)
                has_new = False


def _tail(path: Path, num_lines: int = 15) -> str:
    return "\n".join(path.read_text("utf-8", "replace").splitlines()[-num_lines:])


def down() -> None:
    """End a service wherever it was started."""
    record = read_record()
    if record is None:
        print("nothing is running.")
        return
    try:
        os.kill(record.pid, signal.SIGTERM)
    except ProcessLookupError:
        pass  # it has ended just now
    except PermissionError as error:
        raise SdxlFlowsError(
            f"process {record.pid}, which holds {record.url}, belongs to another user: only they can end it."
        ) from error
    deadline = time.monotonic() + DOWN_WITHIN_S
    while record.is_alive():
        if time.monotonic() > deadline:
            raise SdxlFlowsError(
                f"process {record.pid} has not ended {record.url} within {DOWN_WITHIN_S:.0f} s; see {service_folder()} "
                f"for what it does. `kill -9 {record.pid}` ends it, and with it server and worker."
            )
        time.sleep(0.2)
    print("ended: server and worker are down.")
