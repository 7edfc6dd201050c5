"""How long a cancelled run takes to be gone: its slots, its trainer, or its Ray.

    python benchmarks/cancel.py [--repeats 3]

Cancels through the API, as the browser's button does, a run that is at work on a server and worker of `sdxl-flows up`;
from the call until no process of the run is left. Ten minutes for three repeats on two cores. The tests do the same
(tests/system/), with more room for a busy machine, and look at what is kept.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "tests"))
from measure import machine  # noqa: E402
from support.service import Service, wait_until  # noqa: E402
from support.system_runs import SMALL, begun, cancel, latents_config, parameters  # noqa: E402

from sdxl_core.config import TrainConfig  # noqa: E402
from sdxl_core.demo import draw_samples  # noqa: E402
from sdxl_core.latents.cache import cache_latents  # noqa: E402

AIM_S = 10


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=3)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="cancel_") as folder:
        seconds = measured(Path(folder), options.repeats)
    print(f"{machine()}; load before: {Path('/proc/loadavg').read_text().split()[0]}\n")
    print("| at work | gone after, s, each time | median | 10 s |\n|---|---|---|---|")
    for what, each in seconds.items():
        held = "holds" if max(each) <= AIM_S else "missed"
        print(f"| {what} | {', '.join(f'{s:.1f}' for s in each)} | {median(each):.1f} | {held} |")


def measured(folder: Path, repeats: int) -> dict[str, list[float]]:
    """Seconds of each cancel, by what was at work; in turn, so that a busy minute meets all of them."""
    pictures = folder / "pictures"
    draw_samples(pictures)
    small = latents_config(pictures, folder / "small", **SMALL)
    cache_latents(small)
    service = Service(folder / "service")
    service.folder.mkdir()
    seconds: dict[str, list[float]] = {"two slots": [], "two slots on a Ray of the run's own": [], "trainer": []}
    try:
        started = service.up()
        assert started.returncode == 0, started.stdout + started.stderr
        for turn in range(repeats):
            out = folder / f"{turn}"
            slots = latents_config(pictures, out / "slots")
            on_ray = latents_config(pictures, out / "ray", engine="ray")
            trainer = TrainConfig(
                metadata=small.out / "meta_lat.json", latents=small.out / "latents", out=out / "train",
                max_train_steps=1000, learning_rate=1e-4, use_cpu=True,
            )  # fmt: skip
            jobs: list[tuple[str, str, Any, Callable[[], object]]] = [
                ("two slots", "cache-latents", slots, partial(begun, slots.out)),
                ("two slots on a Ray of the run's own", "cache-latents", on_ray, partial(begun, on_ray.out)),
                ("trainer", "finetune", trainer, (trainer.out / "state" / "progress.json").exists),
            ]
            for what, flow, config, is_at_work in jobs:
                run = service.submit(f"{flow}/{flow}", parameters(config))
                wait_until(is_at_work, timeout_s=300, what=f"the work of {what}")
                seconds[what].append(cancel(service, run))
    finally:
        service.command("down")
    return seconds


if __name__ == "__main__":
    main()
