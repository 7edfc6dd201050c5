"""The lock of one output folder."""

import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import orjson
import pytest

from sdxl_core import lock
from sdxl_core.errors import LockedError
from sdxl_core.lock import LOCK_NAME, output_lock

HOLD = (
    "import sys, time\nfrom pathlib import Path\nfrom sdxl_core.lock import output_lock\n"
    "with output_lock(Path(sys.argv[1]), purpose='other job'):\n    print('held', flush=True)\n    time.sleep(600)\n"
)


def holder(folder: Path) -> subprocess.Popen[str]:
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[2])}
    process = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(folder)], stdout=subprocess.PIPE, text=True, env=environment
    )
    assert process.stdout is not None and process.stdout.readline() == "held\n"
    return process


def test_a_second_process_is_told_who_holds_the_folder(tmp_path: Path) -> None:
    with holder(tmp_path) as process:
        told = pytest.raises(LockedError, match=rf"other job is working on it since .*process {process.pid} ")
        with told, output_lock(tmp_path, purpose="mine"):
            pass
        process.send_signal(signal.SIGKILL)


def test_a_killed_holder_leaves_nothing_locked(tmp_path: Path) -> None:
    with holder(tmp_path) as process:
        process.send_signal(signal.SIGKILL)
    with output_lock(tmp_path, purpose="mine"):
        assert (tmp_path / LOCK_NAME).exists()
    assert list(tmp_path.iterdir()) == []


def test_waiting_for_a_holder_gets_the_folder_when_it_ends(tmp_path: Path) -> None:
    with holder(tmp_path) as process:
        process.send_signal(signal.SIGTERM)
        with output_lock(tmp_path, purpose="mine", wait_s=60):
            assert process.wait(timeout=60) != 0


def test_the_same_process_may_hold_it_twice(tmp_path: Path) -> None:
    with output_lock(tmp_path, purpose="outer"), output_lock(tmp_path, purpose="inner"):
        assert (tmp_path / LOCK_NAME).exists()
    assert not (tmp_path / LOCK_NAME).exists()


def far_lock(folder: Path, **other: object) -> Path:
    """The lock of a holder on another system."""
    path = folder / LOCK_NAME
    with output_lock(folder, purpose="far job"):
        told = orjson.loads(path.read_bytes())
    path.write_bytes(orjson.dumps(told | {"pid": 1, "token": "far"} | (other or {"host": "elsewhere"})))
    return path


def test_a_lock_of_another_machine_counts_until_its_heartbeat_is_old(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lock, "HEARTBEAT_S", 0.2)
    path = far_lock(tmp_path)
    with pytest.raises(LockedError, match="far job"), output_lock(tmp_path, purpose="mine"):
        pass
    old = time.time() - 120
    os.utime(path, (old, old))
    with output_lock(tmp_path, purpose="mine"):
        assert "elsewhere" not in path.read_text()


def test_a_lock_that_cannot_be_read_counts_while_it_is_young(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lock, "HEARTBEAT_S", 0.2)
    (tmp_path / LOCK_NAME).write_bytes(b"garbage")
    with pytest.raises(LockedError, match=r"cannot be read, .* delete it"), output_lock(tmp_path, purpose="mine"):
        pass
    os.utime(tmp_path / LOCK_NAME, (time.time() - 120, time.time() - 120))
    with output_lock(tmp_path, purpose="mine"):
        assert "mine" in (tmp_path / LOCK_NAME).read_text()


@pytest.mark.parametrize("other", [{"boot": "another"}, {"pid_namespace": "pid:[1]"}])
def test_a_process_id_of_another_boot_or_container_proves_nothing(tmp_path: Path, other: dict[str, object]) -> None:
    far_lock(tmp_path, **other)
    with pytest.raises(LockedError, match="far job"), output_lock(tmp_path, purpose="mine"):
        pass


@pytest.mark.parametrize("jump_s", [-7200, 7200])
def test_a_clock_that_jumps_takes_no_lock_from_a_living_holder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, jump_s: int
) -> None:
    monkeypatch.setattr(lock, "HEARTBEAT_S", 4.0)
    path = far_lock(tmp_path)
    stop = threading.Event()

    def beat() -> None:
        os.utime(path, (time.time() - jump_s, time.time() - jump_s))

    def beat_on() -> None:
        while not stop.wait(0.2):
            beat()

    beat()
    thread = threading.Thread(target=beat_on)
    thread.start()
    try:
        with pytest.raises(LockedError, match="far job"), output_lock(tmp_path, purpose="mine"):
            pass
    finally:
        stop.set()
        thread.join()


def test_a_holder_that_was_taken_over_says_so_and_leaves_the_other_lock(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lock, "HEARTBEAT_S", 0.1)
    with pytest.raises(LockedError, match="took over"), output_lock(tmp_path, purpose="mine"):
        taken = orjson.loads((tmp_path / LOCK_NAME).read_bytes()) | {"token": "another", "host": "elsewhere"}
        (tmp_path / LOCK_NAME).write_bytes(orjson.dumps(taken))
        held, deadline = lock._held[tmp_path.resolve()], time.monotonic() + 30
        while not held.is_lost and time.monotonic() < deadline:
            time.sleep(0.05)
    assert orjson.loads((tmp_path / LOCK_NAME).read_bytes())["token"] == "another"


def test_of_threads_that_overlap_the_last_one_out_lets_go(tmp_path: Path) -> None:
    entered, leave = threading.Event(), threading.Event()

    def second() -> None:
        with output_lock(tmp_path, purpose="second"):
            entered.set()
            leave.wait(30)

    with output_lock(tmp_path, purpose="first"):
        thread = threading.Thread(target=second)
        thread.start()
        assert entered.wait(30)
    assert (tmp_path / LOCK_NAME).exists(), "the second is still inside"
    leave.set()
    thread.join()
    assert list(tmp_path.iterdir()) == []
