"""A whole job, training included, looks up no address and connects to nothing but this machine."""

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from sdxl_core.config import JobConfig
from sdxl_core.demo import demo_job

pytestmark = pytest.mark.system
ROOT = Path(__file__).parents[2]
HERE = {"localhost", "127.0.0.1", "::1", "None", "0.0.0.0", "", socket.gethostname()}

NOTE_EVERY_ADDRESS = """
import os, sys

def note(event, arguments):
    if event == "socket.connect" and isinstance(arguments[1], tuple):
        where = arguments[1][0]
    elif event in ("socket.getaddrinfo", "socket.gethostbyname", "socket.sendto"):
        where = arguments[1][0] if event == "socket.sendto" else arguments[0]
    else:
        return
    with open(os.environ["NOTED_ADDRESSES"], "a") as file:
        file.write(f"{where if isinstance(where, str) else where and bytes(where).decode()}\\n")

sys.addaudithook(note)
"""


def test_a_job_reaches_no_other_machine(pictures: Path, tmp_path: Path) -> None:
    values = demo_job(source=pictures, out=tmp_path / "run").model_dump(mode="json")
    values["latents"] |= {"resolution_px": 128, "min_bucket_px": 64, "max_bucket_px": 256, "devices": "cpu,cpu"}
    values["train"] |= {"max_train_steps": 2, "save_every_steps": 2, "sample_size_px": 64, "sample_inference_steps": 1}
    job = tmp_path / "job.json"
    job.write_text(JobConfig.model_validate(values).model_dump_json())
    (tmp_path / "hook").mkdir()
    (tmp_path / "hook" / "sitecustomize.py").write_text(NOTE_EVERY_ADDRESS)
    noted = tmp_path / "addresses"
    code = (
        "import sys; import tasks; from pathlib import Path; from flows.cli import run_job\n"
        "from sdxl_core.config import JobConfig\n"
        "run_job(JobConfig.model_validate_json(Path(sys.argv[1]).read_text()), as_json=False)\n"
    )
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join([str(tmp_path / "hook"), str(ROOT)]),
        "NOTED_ADDRESSES": str(noted),
        "PREFECT_HOME": str(tmp_path / "prefect"),
    }
    for name in ("PREFECT_API_URL", "DO_NOT_TRACK", "PREFECT_SERVER_ANALYTICS_ENABLED"):
        environment.pop(name, None)
    done = subprocess.run(
        [sys.executable, "-c", code, job], cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=600
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-3000:]
    assert (tmp_path / "run" / "model" / "last.safetensors").is_file()
    addresses = set(noted.read_text().splitlines())
    assert "127.0.0.1" in addresses, "the run's own server was seen"
    assert addresses <= HERE, addresses - HERE
