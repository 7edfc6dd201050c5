"""Device slots: one process a device, rebuilt when killed, gone with their parent."""

import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from sdxl_core.devices import SlotDied, Slots, SlotsClosed, resolve_devices
from sdxl_core.errors import ConfigError, TransientError


def test_a_slot_keeps_its_process_from_call_to_call() -> None:
    with Slots(["cpu"]) as slots, slots.checkout() as slot:
        first = slot.run(os.getpid)
        assert first == slot.run(os.getpid) != os.getpid()


def test_a_killed_process_is_a_transient_error_and_the_next_call_works() -> None:
    with Slots(["cpu"]) as slots, slots.checkout() as slot:
        pid = slot.run(os.getpid)
        with pytest.raises(SlotDied) as caught:
            slot.run(os.kill, pid, signal.SIGKILL)
        assert isinstance(caught.value, TransientError)
        assert slot.run(os.getpid) != pid


def test_an_error_in_the_slot_reaches_the_caller_as_itself() -> None:
    with Slots(["cpu"]) as slots, slots.checkout() as slot, pytest.raises(ZeroDivisionError):
        slot.run(divmod, 1, 0)


def test_the_slot_sees_only_its_device() -> None:
    with Slots(["3"]) as slots, slots.checkout() as slot:
        assert slot.run(os.getenv, "CUDA_VISIBLE_DEVICES") == "3"


def test_a_card_may_have_several_slots_and_a_cpu_slot_sees_none() -> None:
    with Slots(["0", "0", "cpu"]) as slots:
        assert [slot.run(os.getenv, "CUDA_VISIBLE_DEVICES") for slot in slots.slots] == ["0", "0", ""]
        assert len({slot.run(os.getpid) for slot in slots.slots}) == 3


@pytest.fixture
def fifo(tmp_path: Path) -> Path:
    """A call that reads it ends when it is written to; opening it to write waits until it is being read."""
    os.mkfifo(tmp_path / "fifo")
    return tmp_path / "fifo"


def test_slots_work_at_once_and_do_not_notice_that_another_dies(fifo: Path) -> None:
    with Slots(["cpu", "cpu"]) as slots:
        dying, working = slots.slots
        pid, pid_of_working = dying.run(os.getpid), working.run(os.getpid)
        answers: list[object] = []
        busy = threading.Thread(target=lambda: answers.append(working.run(Path.read_text, fifo)))
        busy.start()
        with pytest.raises(SlotDied):
            dying.run(os.kill, pid, signal.SIGKILL)
        assert dying.run(os.getpid) != pid
        assert busy.is_alive() and not answers, "its call goes on meanwhile"
        fifo.write_text("go")
        busy.join(timeout=60)
        assert answers == ["go"] and working.run(os.getpid) == pid_of_working


def test_leaving_kills_a_busy_slot_and_its_task_is_not_retried(fifo: Path) -> None:
    failures: list[BaseException] = []
    with Slots(["cpu"]) as slots:
        slot = slots.slots[0]
        slot.run(os.getpid)

        def work() -> None:
            try:
                slot.run(Path.read_text, fifo)
            except SlotsClosed as error:
                failures.append(error)

        busy = threading.Thread(target=work)
        busy.start()
        writing = os.open(fifo, os.O_WRONLY)
    busy.join(timeout=60)
    os.close(writing)
    assert [type(error) for error in failures] == [SlotsClosed]


def test_a_slot_does_not_outlive_a_killed_parent(tmp_path: Path) -> None:
    code = (
        "import os, time\n"
        "from sdxl_core.devices import Slots\n"
        "if __name__ == '__main__':\n"
        "    slot = Slots(['cpu']).slots[0]\n"
        "    print(slot.run(os.getpid), flush=True)\n"
        "    slot.run(time.sleep, 600)\n"
    )
    script = tmp_path / "parent.py"
    script.write_text(code)
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[2])}
    with subprocess.Popen([sys.executable, script], stdout=subprocess.PIPE, text=True, env=environment) as parent:
        assert parent.stdout is not None
        child = int(parent.stdout.readline())
        parent.kill()
    deadline = time.monotonic() + 30
    while _alive(child) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not _alive(child)


def _alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except FileNotFoundError:
        return False


def test_devices_are_named_or_found(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "2,5")
    assert resolve_devices("auto") == ["2", "5"]
    assert resolve_devices("5,5, cpu") == ["5", "5", "cpu"]
    with pytest.raises(ConfigError, match="no device '7' here"):
        resolve_devices("7")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert resolve_devices("auto") == ["cpu"]
    with pytest.raises(ConfigError, match="devices is empty"):
        resolve_devices(" , ")
