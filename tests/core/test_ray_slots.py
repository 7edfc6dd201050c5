"""Device slots on a Ray cluster of two nodes (two sets of Ray's processes on this machine)."""

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory

import psutil
import pytest
from support.ray_cluster import two_nodes
from support.run_processes import listening

from sdxl_core.config import CacheLatentsConfig, LatentsOptions
from sdxl_core.devices import SlotDied, SlotsClosed
from sdxl_core.engines import check_devices, open_slots
from sdxl_core.errors import ConfigError, TransientError
from sdxl_core.ray_guard import alive_in
from sdxl_core.ray_slots import RaySlots

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def cluster() -> Iterator[None]:
    with two_nodes(num_gpus=1):  # Ray is told so; nothing here asks a driver
        yield


@pytest.fixture
def witness(tmp_path: Path) -> Path:
    path = tmp_path / "witness"
    path.write_text("this job")
    return path


def test_every_node_gives_its_gpu_to_one_slot(cluster: None, witness: Path) -> None:
    with RaySlots("auto", address="auto", witness=witness) as slots:
        nodes, cards = set(), []
        for slot in slots.slots:
            assert slot.is_ready(wait_s=180)
            nodes.add(slot.run(os.getppid))  # the node's raylet
            cards.append((slot.run(os.getenv, "CUDA_VISIBLE_DEVICES"), slot.device.rpartition(":")[2]))
        assert len(slots.slots) == len(nodes) == 2
        assert all(visible == shown != "" for visible, shown in cards)


def test_a_slot_keeps_its_process_and_threads_are_not_limited_by_ray(cluster: None, witness: Path) -> None:
    with RaySlots("cpu", address="auto", witness=witness) as slots, slots.checkout() as slot:
        assert slot.run(os.getpid) == slot.run(os.getpid) != os.getpid()
        assert slot.run(os.getenv, "CUDA_VISIBLE_DEVICES") == ""
        assert slot.run(os.getenv, "OMP_NUM_THREADS") == os.environ.get("OMP_NUM_THREADS")
        assert slot.device.endswith(":cpu")


def test_a_killed_actor_is_a_transient_error_and_the_other_does_not_notice(cluster: None, witness: Path) -> None:
    with RaySlots("cpu,cpu", address="auto", witness=witness) as slots:
        first, other = slots.slots
        pid, pid_of_other = first.run(os.getpid), other.run(os.getpid)
        with pytest.raises(SlotDied) as caught:
            first.run(os.kill, pid, signal.SIGKILL)
        assert isinstance(caught.value, TransientError) and "is tried again" in str(caught.value)
        assert first.run(os.getpid) != pid and other.run(os.getpid) == pid_of_other


def test_an_error_in_the_actor_reaches_the_caller_as_itself(cluster: None, witness: Path) -> None:
    with (
        RaySlots("cpu", address="auto", witness=witness) as slots,
        slots.checkout() as slot,
        pytest.raises(ZeroDivisionError),
    ):
        slot.run(divmod, 1, 0)


def test_leaving_kills_a_busy_actor_and_its_task_is_not_retried(cluster: None, witness: Path, tmp_path: Path) -> None:
    failures: list[BaseException] = []
    os.mkfifo(tmp_path / "fifo")
    with RaySlots("cpu", address="auto", witness=witness) as slots:
        slot = slots.slots[0]
        pid = slot.run(os.getpid)

        def work() -> None:
            try:
                with slots.checkout() as slot:
                    slot.run(Path.read_text, tmp_path / "fifo")
            except SlotsClosed as error:
                failures.append(error)

        busy = threading.Thread(target=work)
        busy.start()
        writing = os.open(tmp_path / "fifo", os.O_WRONLY)  # it waits until somebody reads
    busy.join(timeout=60)
    os.close(writing)
    assert [type(error) for error in failures] == [SlotsClosed]
    assert is_gone(pid)


def test_a_slot_without_room_waits_while_the_others_work(cluster: None, witness: Path) -> None:
    with (
        RaySlots("gpu,gpu", address="auto", witness=witness) as busy,
        RaySlots("gpu", address="auto", witness=witness) as late,
    ):
        pids = [slot.run(os.getpid) for slot in busy.slots]
        assert not late.slots[0].is_ready(wait_s=0.5)
        busy.stop()
        with late.checkout() as slot:
            assert slot.run(os.getpid) not in pids


def test_a_machine_that_does_not_see_the_job_is_refused(cluster: None, witness: Path) -> None:
    with RaySlots("cpu", address="auto", witness=witness) as slots:
        witness.write_text("another machine's")
        with pytest.raises(ConfigError, match="does not see the files of this job"), slots.checkout():
            pass


def test_more_slots_than_the_cluster_has_are_refused(cluster: None, witness: Path) -> None:
    with pytest.raises(ConfigError, match="asks for 3 gpu slots, and the Ray cluster has 2"):
        RaySlots("gpu,gpu,gpu", address="auto", witness=witness).__enter__()


@pytest.fixture
def short() -> Iterator[Path]:
    """A folder whose path leaves room for the names of sockets."""
    with TemporaryDirectory(dir="/tmp") as folder:
        yield Path(folder)


def test_a_ray_of_its_own_listens_on_loopback_and_dies_with_a_killed_driver(
    cluster: None, witness: Path, short: Path, tmp_path: Path
) -> None:
    """All of it, agents and folder too, within seconds; another Ray of this machine does not notice."""
    code = (
        "import os, subprocess, sys, time\n"
        "from pathlib import Path\n"
        "from sdxl_core.ray_slots import RaySlots\n"
        "witness = Path(sys.argv[1]); witness.write_text('job')\n"
        "with RaySlots('cpu', address='local', witness=witness) as slots:\n"
        "    slot = slots.slots[0]\n"
        "    print(slot.run(os.getpid), flush=True)\n"
        "    slot.run(time.sleep, 600)\n"
    )
    environment = os.environ | {"PYTHONPATH": str(ROOT), "MARK_OF_THIS_TEST": str(tmp_path), "RAY_TMPDIR": str(short)}
    command = [sys.executable, "-c", code, str(tmp_path / "witness")]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment, cwd=tmp_path) as driver:
        assert driver.stdout is not None
        actor = int(driver.stdout.readline())
        family = marked(str(tmp_path))
        assert {actor, driver.pid} < family and len(family) > 5  # raylet, head, two agents, …
        addresses, sessions = listening(family), sessions_of(family)
        driver.kill()
    assert addresses and addresses <= {"127.0.0.1"}, addresses
    assert is_gone(actor)
    assert not left(sessions) and not list(short.iterdir())
    with RaySlots("cpu", address="auto", witness=witness) as slots:
        assert slots.slots[0].run(os.getpid) != actor


def test_a_ray_of_its_own_dies_with_a_driver_that_is_killed_while_it_starts(short: Path, tmp_path: Path) -> None:
    code = (
        "import sys; from sdxl_core.ray_slots import RaySlots; RaySlots('cpu', address='local', witness='').__enter__()"
    )
    environment = os.environ | {"PYTHONPATH": str(ROOT), "MARK_OF_THIS_TEST": str(tmp_path), "RAY_TMPDIR": str(short)}
    with subprocess.Popen([sys.executable, "-c", code], env=environment, cwd=tmp_path) as driver:
        deadline = time.monotonic() + 60
        while len(family := marked(str(tmp_path))) < 3 and time.monotonic() < deadline:  # itself, guard, Ray's first
            time.sleep(0.01)
        sessions = sessions_of(family)
        driver.kill()
    assert driver.returncode == -signal.SIGKILL
    assert not left(sessions) and not marked(str(tmp_path)) and not list(short.iterdir())


CANCELLED = """
import os, signal, sys, threading, time
from pathlib import Path
import psutil
from sdxl_core.ray_slots import RaySlots

class Cancelled(BaseException): pass

def cancel(*_): raise Cancelled

def work(slot):
    try: slot.run(Path.read_text, fifo)
    except BaseException as error: print(type(error).__name__, flush=True)

signal.signal(signal.SIGTERM, cancel)
witness = Path(sys.argv[1]); witness.write_text("job")
fifo = witness.with_name("fifo"); os.mkfifo(fifo)
try:
    with RaySlots("cpu", address="local", witness=witness) as slots:
        slots.slots[0].run(os.getpid)
        print(*{os.getsid(child.pid) for child in psutil.Process().children(recursive=True)}, flush=True)
        busy = threading.Thread(target=work, args=(slots.slots[0],)); busy.start()
        os.open(fifo, os.O_WRONLY)  # it waits until somebody reads
        asked = time.monotonic(); os.killpg(os.getpgid(0), signal.SIGTERM); time.sleep(60)
except Cancelled:
    print(time.monotonic() - asked, flush=True)
"""


def test_a_signal_to_the_whole_group_cancels_as_ever_and_ray_ends_at_once(tmp_path: Path) -> None:
    """As a worker cancels a run. Ray would take the signal for its own, end first, and make the call look dead."""
    command = [sys.executable, "-c", CANCELLED, str(tmp_path / "witness")]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        command, env=environment, cwd=tmp_path, stdout=subprocess.PIPE, text=True, timeout=240, start_new_session=True
    )
    sessions, error, seconds = done.stdout.splitlines()
    assert error == "SlotsClosed" and float(seconds) < 30
    assert len(sessions.split()) > 4 and not left({int(session) for session in sessions.split()})


def test_without_ray_installed_it_is_said_before_anything_starts(monkeypatch: pytest.MonkeyPatch) -> None:
    import importlib.util

    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    config = CacheLatentsConfig(engine="ray", source=Path("in"), metadata=Path("m.json"), out=Path("out"), vae="tiny")
    with pytest.raises(ConfigError, match=r"pip install 'sdxl-flows\[ray\]'"):
        open_slots(config)
    with pytest.raises(ConfigError, match=r"pip install 'sdxl-flows\[ray\]'"):
        check_devices(config)


def test_devices_of_a_cluster_have_words_of_their_own() -> None:
    with pytest.raises(ConfigError, match="Ray chooses machines and cards"):
        check_devices(LatentsOptions(engine="ray", devices="0,1"))
    check_devices(LatentsOptions(engine="ray", devices="gpu, gpu"))


def is_gone(pid: int) -> bool:
    deadline = time.monotonic() + 60
    while Path(f"/proc/{pid}").exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    return not Path(f"/proc/{pid}").exists()


def sessions_of(pids: set[int]) -> set[int]:
    """Ours is none of them."""
    return {os.getsid(pid) for pid in pids} - {os.getsid(0)}


def left(sessions: set[int]) -> list[str]:
    """Command lines of what is alive in the sessions, when nothing is or a minute has passed."""
    deadline = time.monotonic() + 60
    while (pids := alive_in(sessions)) and time.monotonic() < deadline:
        time.sleep(0.1)
    return [" ".join(psutil.Process(pid).cmdline()) for pid in pids]


def marked(text: str) -> set[int]:
    """Processes that have the text in their environment, zombies left out. Agents of Ray hide it, some time after."""
    found = set()
    for entry in Path("/proc").glob("[0-9]*"):
        try:
            state = (entry / "stat").read_text().rpartition(")")[2].split()[0]
            if f"MARK_OF_THIS_TEST={text}".encode() in (entry / "environ").read_bytes() and state != "Z":
                found.add(int(entry.name))
        except OSError:
            continue
    return found
