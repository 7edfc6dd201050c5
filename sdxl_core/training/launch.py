"""Start the trainer with `accelerate launch`, watch it, and bring back what it made."""

from __future__ import annotations

import logging
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import orjson

from sdxl_core import errors
from sdxl_core.config import TrainConfig
from sdxl_core.devices import cuda_devices
from sdxl_core.errors import CheckpointError, ConfigError, TrainingError, TransientError
from sdxl_core.files import disk_errors, write_atomic
from sdxl_core.lock import output_lock
from sdxl_core.processes import end_group
from sdxl_core.progress import Progress, no_progress
from sdxl_core.refs import CheckpointRef
from sdxl_core.training.caption_rules import caption_warning, tag_rates
from sdxl_core.training.preflight import check_training, check_writable
from sdxl_core.training.processes import WATCH_STDIN, read_outcome
from sdxl_core.training.result import finished_result, read_result
from sdxl_core.training.training_set import TrainingSet, read_training_set

GRACE_S = 8.0  # Prefect gives a cancelled flow ten seconds
SAVING_BYTES_PER_S = 100e6  # a slow disk; a state is about twice the base model in half precision
POLL_S = 0.2
LOG_TAIL_LINES = 12
logger = logging.getLogger(__name__)


def launch_training(config: TrainConfig, *, progress: Progress = no_progress) -> CheckpointRef:
    """Fine-tune in processes of its own, continuing from the newest state; a finished run answers at once.

    Raises: ConfigError, DataError: the inputs cannot be right (found before anything starts), or the settings are not
            those of the state that is there.   LockedError: another process trains into this folder.
            TrainingError, CheckpointError, DiskFullError: the trainer gave up, in its words.
            TransientError: it was killed; calling again continues.
    """
    check_writable(config)
    training_set = read_training_set(config)
    check_training(config, training_set)
    _say_warnings(config)
    config = config.model_copy(update={"use_cpu": _on_cpu(config)})
    state = config.out / "state"
    with disk_errors(state):
        state.mkdir(parents=True, exist_ok=True)
    with output_lock(state, purpose="train"):
        done = finished_result(config, training_set)
        if done is not None:
            progress("train", done.num_steps, done.num_steps, "finished before")
            return done
        _check_disk(config, training_set)
        _say_if_the_schedule_changes(config, steps_per_epoch=training_set.plan(config).num_steps)
        (state / "outcome.json").unlink(missing_ok=True)
        (state / "progress.json").unlink(missing_ok=True)
        log = config.out / "train.log"
        with _sigterm_as_interrupt(), _trainer(config, log) as process:
            _watch(process, state, progress)
        _raise_failure(state, log, process.returncode)
        result = read_result(config)
        if result is None:
            raise CheckpointError(f"{state / 'result.json'}: the trainer ended well but left no result. See {log}.")
        return result


def _say_warnings(config: TrainConfig) -> None:
    """Raises: ConfigError, DataError: base model, optimizer, captions or their tags' categories cannot be right."""
    from sdxl_core.models import base_prediction, check_prediction  # imports torch
    from sdxl_core.training.optimizer_kinds import optimizer_warning

    tag_rates(config)
    prediction = check_prediction(config.base_model, base_prediction(config.base_model), config)
    optimizer = optimizer_warning(config.optimizer, config.optimizer_args)
    for warning in (prediction, optimizer, caption_warning(config)):
        if warning:
            logger.warning(warning)


def _check_disk(config: TrainConfig, training_set: TrainingSet) -> None:
    from sdxl_core.training.disk_guard import check_disk  # imports torch

    check_disk(config, training_set)


def _say_if_the_schedule_changes(config: TrainConfig, *, steps_per_epoch: int) -> None:
    from sdxl_core.training.continuing import schedule_warning  # imports torch

    warning = schedule_warning(config, steps_per_epoch=steps_per_epoch)
    if warning:
        logger.warning(warning)


def _on_cpu(config: TrainConfig) -> bool:
    """Raises: ConfigError: more processes than cards."""
    cards = cuda_devices()
    use_cpu = not cards if config.use_cpu is None else config.use_cpu
    if not use_cpu and config.num_processes > len(cards):
        raise ConfigError(
            f"num_processes = {config.num_processes}, but {len(cards)} CUDA cards are visible here. Lower "
            f"num_processes, or set use_cpu = true."
        )
    return use_cpu


def accelerate_config(config: TrainConfig) -> dict[str, str | int | bool]:
    """What `accelerate config` would ask for, as it wants it. MULTI_GPU with use_cpu starts processes over gloo."""
    return {
        "compute_environment": "LOCAL_MACHINE",
        "distributed_type": "MULTI_GPU" if config.num_processes > 1 else "NO",
        "num_machines": 1,
        "machine_rank": 0,
        "num_processes": config.num_processes,
        "main_process_port": 0,
        "gpu_ids": "all",
        "mixed_precision": config.mixed_precision,
        "use_cpu": bool(config.use_cpu),
        "main_training_function": "main",
        "dynamo_backend": "NO",
        "debug": False,
    }


@contextmanager
def _trainer(config: TrainConfig, log: Path) -> Iterator[subprocess.Popen[bytes]]:
    """The trainer in a session of its own. Leaving by an exception (Ctrl-C, cancellation) ends it: SIGTERM first, so

    that it saves its state. Its stdin is ours to hold: it ends by itself should this process be killed.
    """
    state = config.out / "state"
    write_atomic(state / "config.json", config.model_dump_json(indent=2).encode(), sync=False)
    settings = state / "accelerate.yaml"
    write_atomic(settings, orjson.dumps(accelerate_config(config), option=orjson.OPT_INDENT_2), sync=False)
    command = [
        sys.executable, "-m", "accelerate.commands.launch", "--config_file", str(settings),
        "--num_cpu_threads_per_process", str(_threads(config)),
        "-m", "sdxl_core.training", "--config", str(state / "config.json"),
    ]  # fmt: skip
    # Threads that spin while they wait make a busy machine many times slower (measured: 2.4 times on two cores).
    environment = (
        {"OMP_WAIT_POLICY": "PASSIVE"}
        | os.environ
        | {
            WATCH_STDIN: "1",
            "PYTHONUNBUFFERED": "1",
            "HF_HUB_OFFLINE": "1",
            "CUBLAS_WORKSPACE_CONFIG": ":4096:8",
        }
    )
    with disk_errors(log), open(log, "ab") as output:
        process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=output, stderr=output, env=environment, start_new_session=True
        )
    try:
        yield process
    finally:
        end_group(process, grace_s=grace_s(config.base_model))
        if process.stdin is not None:
            process.stdin.close()


@contextmanager
def _sigterm_as_interrupt() -> Iterator[None]:
    """SIGTERM to this process is Ctrl-C, so that the trainer gets to save its state; not where somebody handles it

    already (Prefect does), and not outside the main thread.
    """
    is_main = threading.current_thread() is threading.main_thread()
    if not is_main or signal.getsignal(signal.SIGTERM) is not signal.SIG_DFL:
        yield
        return
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)


def grace_s(base_model: str) -> float:
    """Seconds that the trainer gets to save its state and leave, by the size of what it trains."""
    path = Path(base_model)
    files = path.rglob("*.safetensors") if path.is_dir() else [path] if path.is_file() else []
    return GRACE_S + 2 * sum(file.stat().st_size for file in files) / SAVING_BYTES_PER_S


def _threads(config: TrainConfig) -> int:
    """CPU threads a training process: OMP_NUM_THREADS where it is set, else an equal share of the cores.

    The tiny preset's tensors are too small to share: 15 steps take 23 s with one thread and 30 s with two.
    """
    wanted = os.environ.get("OMP_NUM_THREADS", "")
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    if wanted.isdigit():
        return int(wanted)
    return 1 if config.base_model == "tiny" else max(1, cores // config.num_processes)


def _watch(process: subprocess.Popen[bytes], state: Path, progress: Progress) -> None:
    last = -1
    while True:
        ended = process.poll() is not None
        try:
            record = orjson.loads((state / "progress.json").read_bytes())
        except (FileNotFoundError, orjson.JSONDecodeError):
            record = None
        if record is not None and record["step"] != last:
            last = record["step"]
            note = (
                f"loss {record['loss']:.4f}, avr_loss {record['avr_loss']:.4f}, {record['images_per_s']:.2f} images/s"
            )
            progress("train", last, record["total"], note)
        if ended:
            return
        time.sleep(POLL_S)


def _raise_failure(state: Path, log: Path, returncode: int) -> None:
    outcome = read_outcome(state)
    if outcome is not None and outcome.status == "finished":
        return
    if outcome is not None and outcome.status == "failed":
        kind = getattr(errors, outcome.error, TrainingError)
        raise kind(f"{outcome.message} (The trainer's log: {log})")
    if outcome is not None and outcome.status == "stopped":
        raise TransientError(f"the trainer was asked to stop; its state is saved in {state}. Run it again to continue.")
    if outcome is not None or returncode < 0:
        raise TransientError(
            f"the trainer was killed (out of memory, or a signal). Its last saved state is in {state}; running it "
            f"again continues there. Its log: {log}"
        )
    raise TrainingError(f"the trainer could not be started. The end of {log}:\n{_tail(log)}")


def _tail(log: Path) -> str:
    return "\n".join(log.read_text("utf-8", "replace").splitlines()[-LOG_TAIL_LINES:])
