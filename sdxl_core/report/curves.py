"""The scalars of a run's TensorBoard log, and how to look at them."""

from __future__ import annotations

import shlex
import sys
from pathlib import Path


def tensorboard_command(folder: Path) -> str:
    """A command line that works as pasted where we are, also without this environment's bin/ on PATH."""
    program = Path(sys.executable).parent / "tensorboard"
    if program.is_relative_to(Path.cwd()):
        program = program.relative_to(Path.cwd())
    return shlex.join([str(program), "--logdir", str(folder)])


def read_scalars(folder: Path) -> dict[str, list[tuple[float, float]]]:
    """Every scalar of the newest run below `folder` as (step, value) points; {} where there is none."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    files = sorted(folder.rglob("events.out.tfevents.*"), key=lambda path: path.stat().st_mtime_ns)
    if not files:
        return {}
    events = EventAccumulator(str(files[-1].parent), size_guidance={"scalars": 0})
    events.Reload()
    return {
        name: [(float(event.step), float(event.value)) for event in events.Scalars(name)]
        for name in events.Tags()["scalars"]
    }
