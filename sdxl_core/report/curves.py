"""The scalars of a run's TensorBoard log."""

from __future__ import annotations

from pathlib import Path


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
