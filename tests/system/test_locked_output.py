"""Two runs for one output: the loser says who holds it, and comes back by itself."""

import json
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from support.service import ROOT, Service

pytestmark = pytest.mark.system

HOLD = (
    "import sys, time\nfrom pathlib import Path\nfrom sdxl_core.lock import output_lock\n"
    "with output_lock(Path(sys.argv[1]), purpose='other merge'):\n    print('held', flush=True)\n    time.sleep(600)\n"
)


def test_a_losing_run_says_who_holds_the_output_and_finishes_when_it_is_free(service: Service, tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "a.png").write_bytes(b"never opened by merging")
    (tmp_path / "in" / "a.txt").write_text("1girl")
    config = {"source": str(tmp_path / "in"), "out": str(tmp_path / "m.json")}
    with subprocess.Popen(
        [sys.executable, "-c", HOLD, str(tmp_path / ".m.json.work")], stdout=subprocess.PIPE, cwd=ROOT,
        env=service.environment | {"SDXL_FLOWS_RUN": "sleepy-otter 1"},
    ) as holder:  # fmt: skip
        assert holder.stdout is not None and holder.stdout.readline() == b"held\n"
        run = service.submit("merge-tags/merge-tags", {"config": config})
        waiting = service.wait_for(run, "AwaitingOutput")
        assert f"process {holder.pid} " in waiting.message and "run sleepy-otter 1" in waiting.message
        other = service.submit("merge-tags/merge-tags", {"config": config | {"out": str(tmp_path / "other.json")}})
        service.wait_for(other, "Completed")  # another output waits for nobody
        assert not (tmp_path / "m.json").exists()
        holder.send_signal(signal.SIGKILL)
    service.wait_for(run, "Completed", timeout_s=300)  # its pauses double
    assert json.loads((tmp_path / "m.json").read_bytes()) == {"a": {"tags": "1girl"}}
