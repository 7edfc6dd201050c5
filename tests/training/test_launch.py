"""The trainer as processes: started, watched, killed, continued, and never left behind."""

import contextlib
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import orjson
import pytest
import torch
from safetensors.torch import load_file

from sdxl_core.config import TrainConfig
from sdxl_core.errors import ConfigError, DataError, SdxlFlowsError, TransientError
from sdxl_core.processes import process_start
from sdxl_core.training import launch
from sdxl_core.training.launch import accelerate_config, grace_s, launch_training
from sdxl_core.training.result import finished_result
from sdxl_core.training.training_set import read_training_set

Configure = Callable[..., TrainConfig]
Train = Callable[..., bool]
TIMEOUT_S = 240.0
TORCHS_PORT = 29500
LAUNCHER = """
import sys
from pathlib import Path
from sdxl_core.config import TrainConfig
from sdxl_core.training import launch
launch.GRACE_S = 60
launch.launch_training(TrainConfig.model_validate_json(Path(sys.argv[1]).read_bytes()))
"""


def trainers(out: Path) -> list[int]:
    """Process ids of the training processes (launcher and ranks) that work into `out`."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            command = path.read_bytes().replace(b"\0", b" ").decode()
        except (FileNotFoundError, ProcessLookupError):
            continue
        if f"-m sdxl_core.training --config {out}" in command and process_start(int(path.parent.name)):
            found.append(int(path.parent.name))
    return found


def wait_until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + TIMEOUT_S
    while not condition():
        assert time.monotonic() < deadline, "it did not happen"
        time.sleep(0.05)


def at_step(step: int, action: Callable[[], Any]) -> Callable[..., None]:
    """A progress callback that acts once the trainer has reached `step`."""

    def progress(stage: str, done: int, total: int, note: str = "") -> None:
        assert stage == "train" and done <= total
        if done >= step:
            action()

    return progress


def interrupt() -> None:
    raise KeyboardInterrupt


def kill_trainers(out: Path) -> None:
    for pid in trainers(out):
        os.kill(pid, signal.SIGKILL)


def saved_steps(config: TrainConfig) -> list[int]:
    return sorted(int(path.name.removeprefix("step-")) for path in (config.out / "state").glob("step-*"))


@pytest.fixture(autouse=True)
def one_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    """Sums are rounded differently on more threads; runs are compared bit for bit here."""
    monkeypatch.setenv("OMP_NUM_THREADS", "1")


def test_interrupted_then_killed_then_finished_equals_undisturbed(
    config: Configure, train: Train, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ctrl-C saves the state; kill -9 costs the steps since the last state; the result is the same to the bit."""
    monkeypatch.setattr(launch, "GRACE_S", 60.0)
    disturbed = config(max_train_steps=28, caption_dropout_rate=0.3)
    with pytest.raises(KeyboardInterrupt):
        launch_training(disturbed, progress=at_step(2, interrupt))
    assert not trainers(disturbed.out)
    (first,) = saved_steps(disturbed)
    assert 2 <= first < 20, "the kill must find it at work"

    with pytest.raises(TransientError, match="was killed") as error:
        launch_training(disturbed, progress=at_step(first + 2, lambda: kill_trainers(disturbed.out)))
    assert str(disturbed.out / "train.log") in str(error.value)
    assert saved_steps(disturbed) == [first]

    result = launch_training(disturbed)
    undisturbed = disturbed.model_copy(update={"out": disturbed.out / "undisturbed"})
    assert train(undisturbed)
    expected, actual = (load_file(run.out / "model" / "last.safetensors") for run in (undisturbed, disturbed))
    assert actual.keys() == expected.keys()
    assert not [name for name in actual if not torch.equal(actual[name], expected[name])]

    log = (disturbed.out / "train.log").stat()
    assert launch_training(disturbed) == result
    assert (disturbed.out / "train.log").stat().st_mtime_ns == log.st_mtime_ns, "nothing was started"
    result.file.path.write_bytes(b"altered")
    done = disturbed.model_copy(update={"use_cpu": True})
    assert finished_result(done, read_training_set(done)) is None, "an altered checkpoint is made again"


def test_sigterm_to_the_launching_process_saves_the_state(config: Configure, tmp_path: Path) -> None:
    """As systemd, docker and batch systems end things."""
    run = config(max_train_steps=100_000)
    (tmp_path / "config.json").write_text(run.model_dump_json())
    launcher = subprocess.Popen([sys.executable, "-c", LAUNCHER, str(tmp_path / "config.json")])
    try:
        wait_until(lambda: (run.out / "state" / "progress.json").exists())
        launcher.terminate()
        launcher.wait(timeout=TIMEOUT_S)
    finally:
        launcher.kill()
    assert not trainers(run.out) and len(saved_steps(run)) == 1
    assert "asked to stop: state saved" in (run.out / "train.log").read_text()


def test_trainers_end_when_the_launching_process_is_killed(config: Configure, tmp_path: Path) -> None:
    run = config(max_train_steps=100_000)
    (tmp_path / "config.json").write_text(run.model_dump_json())
    launcher = subprocess.Popen([sys.executable, "-c", LAUNCHER, str(tmp_path / "config.json")])
    try:
        wait_until(lambda: (run.out / "state" / "progress.json").exists())
        assert trainers(run.out)
    finally:
        launcher.kill()
        launcher.wait()
    wait_until(lambda: not trainers(run.out))


def test_two_processes_equal_one_at_equal_global_batch(config: Configure, train: Train) -> None:
    """Partial batches included: with batches of 2 and buckets of 4, 3 and 3, one process has none now and then.

    The port that torch would meet on is taken, as by another training: the processes find a free one.
    """
    plain = config(
        optimizer="adamw", weights_dtype="float32", mixed_precision="no", max_train_steps=6,
        gradient_accumulation_steps=2, learning_rate=1e-4, learning_rate_te2=1e-4,
    )  # fmt: skip
    two = plain.model_copy(update={"num_processes": 2, "train_batch_size": 1, "out": plain.out / "two"})
    assert train(plain)
    one = load_file(plain.out / "model" / "last.safetensors")
    with socket.socket() as taken:
        with contextlib.suppress(OSError):  # somebody else has it: as good
            taken.bind(("", TORCHS_PORT))
            taken.listen()
        other = load_file(launch_training(two).file.path)
    for name, value in one.items():
        torch.testing.assert_close(other[name], value, rtol=0, atol=2e-5, msg=name)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"metadata": Path("/nowhere/meta_lat.json")}, "metadata = /nowhere/meta_lat.json: there is no such file"),
        ({"latents": Path("/nowhere")}, "latents = /nowhere: there is no such folder"),
        ({"num_processes": 2, "use_cpu": False}, "CUDA card"),
        ({"optimizer": "nowhere.Adam"}, "there is no nowhere.Adam here"),
    ],
)
def test_inputs_that_are_not_there_are_refused_before_anything_starts(
    config: Configure, changes: dict[str, Any], message: str
) -> None:
    run = config(**changes)
    with pytest.raises(ConfigError, match=message):
        launch_training(run)
    assert not (run.out / "train.log").exists()


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ({"tags": "a"}, "'odd' has no train_resolution.*meta_lat.json"),
        ({"tags": "a", "train_resolution": [60, 64]}, "multiples of 8"),
        ({"tags": "a", "train_resolution": [64, 64]}, "holds no latents of 'odd'"),
    ],
)
def test_entries_that_cannot_be_trained_on_are_named(
    config: Configure, tmp_path: Path, entry: dict[str, Any], message: str
) -> None:
    run = config(metadata=tmp_path / "odd.json")
    run.metadata.write_bytes(orjson.dumps({"odd": entry}))
    with pytest.raises(DataError, match=message):
        launch_training(run)


def test_the_trainers_own_refusal_arrives_as_its_paragraph(config: Configure) -> None:
    with pytest.raises(SdxlFlowsError, match="no such file or folder") as error:
        launch_training(config(base_model="/nowhere/model.safetensors"))
    assert isinstance(error.value, ConfigError) and "Traceback" not in str(error.value)


def test_a_large_model_gets_the_time_to_save_its_state(tmp_path: Path) -> None:
    assert grace_s("tiny") == 8
    with open(tmp_path / "model.safetensors", "wb") as file:
        file.truncate(7_000_000_000)
    assert grace_s(str(tmp_path / "model.safetensors")) == grace_s(str(tmp_path)) == pytest.approx(148)


def test_the_accelerate_configuration_starts_as_many_processes_as_asked(config: Configure) -> None:
    assert accelerate_config(config())["distributed_type"] == "NO"
    two = accelerate_config(config(num_processes=2))
    assert (two["distributed_type"], two["num_processes"], two["use_cpu"]) == ("MULTI_GPU", 2, True)
