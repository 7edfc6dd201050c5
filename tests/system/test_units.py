"""The units of deployments/systemd: read by systemd, and run by a user manager in namespaces of its own."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from support.service import ROOT

pytestmark = pytest.mark.system
UNITS = sorted((ROOT / "deployments" / "systemd").glob("*.service"))
UNSHARE = ("unshare", "--mount", "--propagation=private", "--net", "--pid", "--fork", "--kill-child", "--mount-proc")


def no_systemd() -> str:
    """Why there is none here, "" where there is."""
    return "" if shutil.which("systemd-analyze") else "systemd is not installed: apt install systemd"


def no_namespaces() -> str:
    """Why no user manager can be started here, "" where it can."""
    if no_systemd():
        return no_systemd()
    can = shutil.which("unshare") and subprocess.run([*UNSHARE, "mount", "-t", "tmpfs", "none", "/run"], check=False)
    return "" if can and can.returncode == 0 else "mount, net and pid namespaces cannot be made here (not root?)"


@pytest.mark.skipif(bool(no_systemd()), reason=no_systemd() or "-")
def test_systemd_has_nothing_to_say_about_the_units(tmp_path: Path) -> None:
    (tmp_path / "sdxl-flows").mkdir()
    (tmp_path / "sdxl-flows" / ".venv").symlink_to(sys.prefix)
    environment = os.environ | {"HOME": str(tmp_path), "XDG_RUNTIME_DIR": str(tmp_path)}
    verify = ["systemd-analyze", "verify", "--user", "--recursive-errors=yes"]
    done = subprocess.run([*verify, *UNITS], env=environment, capture_output=True, text=True, timeout=60, check=False)
    assert len(UNITS) == 3 and (done.returncode, done.stdout + done.stderr) == (0, "")


@pytest.mark.skipif(bool(no_namespaces()), reason=no_namespaces() or "-")
def test_the_units_start_come_back_when_killed_run_a_deployment_and_stop(tmp_path: Path) -> None:
    script = Path(__file__).parents[1] / "support" / "units.sh"
    home = tmp_path / "home"
    done = subprocess.run(
        [*UNSHARE, "bash", script, ROOT, sys.prefix, home], capture_output=True, text=True, timeout=600, check=False
    )
    log = (home / "systemd.log").read_text() if (home / "systemd.log").exists() else ""
    assert done.stdout.splitlines() == [
        "started: active active active",
        "back: active active active",
        'ran: {"a":{"tags":"1girl"}}',
        "stopped: inactive inactive inactive",
    ], done.stdout + done.stderr + log[-3000:]
