"""`python -m sdxl_core.training --config FILE.json`, under `accelerate launch`: one training process.

Exit status: 0 done, or asked to stop and state saved; 1 failed; 2 a config that cannot be right.
"""

from __future__ import annotations

import argparse
import logging
import sys
import traceback
from pathlib import Path

from pydantic import ValidationError

from sdxl_core.config import TrainConfig
from sdxl_core.errors import ConfigError, SdxlFlowsError
from sdxl_core.training.processes import Outcome, StopSignal, end_with_launcher, write_outcome


def main() -> int:
    """Train, and tell how it went: on stderr, in `state/outcome.json`, by the exit status."""
    end_with_launcher()
    stop = StopSignal()
    parser = argparse.ArgumentParser(prog="python -m sdxl_core.training")
    parser.add_argument("--config", type=Path, required=True, metavar="FILE.json", help="a TrainConfig as JSON")
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", datefmt="%H:%M:%S")
    for name in ("accelerate", "httpx", "tensorboard"):
        logging.getLogger(name).setLevel(logging.WARNING)
    try:
        config = _read(parser.parse_args().config)
    except ConfigError as error:
        print(f"\nerror: {error}", file=sys.stderr)
        return error.exit_status
    return _run(config, stop)


def _read(path: Path) -> TrainConfig:
    try:
        return TrainConfig.model_validate_json(path.read_bytes())
    except (OSError, ValidationError) as error:
        raise ConfigError(f"--config {path}: cannot be used: {error}") from error


def _run(config: TrainConfig, stop: StopSignal) -> int:
    state = config.out / "state"
    try:
        from sdxl_core.training.loop import train

        write_outcome(state, Outcome(status="running"))
        finished = train(config, stop=stop)
    except SdxlFlowsError as error:
        print(f"\nerror: {error}", file=sys.stderr, flush=True)
        write_outcome(state, Outcome(status="failed", error=type(error).__name__, message=str(error)))
        return error.exit_status
    except Exception as error:
        traceback.print_exc()
        if not _lost_a_process(error):
            message = f"the trainer met an error of its own: {type(error).__name__}: {error}"
            write_outcome(state, Outcome(status="failed", error="TrainingError", message=message))
        return 1
    write_outcome(state, Outcome(status="finished" if finished else "stopped"))
    return 0


def _lost_a_process(error: Exception) -> bool:
    """Another training process was killed: the run may be tried again, as if this one had been killed too."""
    import torch

    return isinstance(error, torch.distributed.DistError) or "gloo" in str(error) or "NCCL" in str(error)


if __name__ == "__main__":
    sys.exit(main())
