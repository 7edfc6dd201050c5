"""A PostgreSQL of its own in a temporary folder, from Debian's package, on loopback."""

import os
import pwd
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

from support.service import free_ports

VERSIONS = Path("/usr/lib/postgresql")


def binaries() -> Path | None:
    """Where initdb and pg_ctl of the newest installed version are."""
    found = sorted(VERSIONS.glob("*/bin/initdb"), key=lambda path: int(path.parts[-3]))
    if found:
        return found[-1].parent
    on_path = shutil.which("initdb")
    return Path(on_path).parent if on_path else None


def missing() -> str:
    """Why it cannot be used here, "" where it can."""
    if binaries() is None:
        return "PostgreSQL is not installed: apt install postgresql"
    if os.geteuid() == 0 and _account() is None:
        return "PostgreSQL does not run as root, and there is no user postgres or nobody to run it as"
    return ""


@contextmanager
def postgres() -> Iterator[str]:
    """The address of an empty database, gone afterwards. Its user is postgres; only this machine can reach it."""
    folder = binaries()
    assert folder is not None
    user = _account() if os.geteuid() == 0 else None
    (port,) = free_ports(1)
    with TemporaryDirectory(prefix="postgres-") as home:
        if user:
            os.chown(home, pwd.getpwnam(user).pw_uid, pwd.getpwnam(user).pw_gid)
        data, log = Path(home, "data"), Path(home, "log")

        def call(name: str, *argv: str) -> None:
            done = subprocess.run(
                [str(folder / name), *argv], user=user, group=user and pwd.getpwnam(user).pw_gid, cwd=home,
                stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, check=False,
            )  # fmt: skip
            assert done.returncode == 0, done.stderr + (log.read_text() if log.exists() else "")

        call("initdb", "-D", str(data), "-U", "postgres", "-A", "trust", "--no-sync", "-E", "UTF8")
        options = f"-p {port} -c listen_addresses=127.0.0.1 -c unix_socket_directories={home}"
        call("pg_ctl", "-D", str(data), "-l", str(log), "-o", options, "-w", "start")
        try:
            call("createdb", "-h", "127.0.0.1", "-p", str(port), "-U", "postgres", "prefect")
            yield f"postgresql://postgres@127.0.0.1:{port}/prefect"
        finally:
            call("pg_ctl", "-D", str(data), "-m", "immediate", "-w", "stop")


def _account() -> str | None:
    for name in ("postgres", "nobody"):
        try:
            return pwd.getpwnam(name).pw_name
        except KeyError:
            continue
    return None
