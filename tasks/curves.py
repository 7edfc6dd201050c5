"""Where the curves of a run are seen while it trains: the TensorBoard that `sdxl-flows up` keeps running.

TensorBoard looks into one folder; each run gets a link there to its own (flows/service/up.py says where both are).
"""

from __future__ import annotations

import os
from contextlib import suppress
from pathlib import Path

from prefect.artifacts import create_link_artifact, create_markdown_artifact

from sdxl_core.config import TrainConfig
from sdxl_core.files import digest_of
from tasks.artifacts import never_failing

CURVES_URL = "SDXL_FLOWS_TENSORBOARD_URL"
CURVES_FOLDER = "SDXL_FLOWS_TENSORBOARD_FOLDER"


@never_failing("the link to the curves")
def show_curves(config: TrainConfig) -> None:
    """Before training: a link to the running TensorBoard, or the command that starts one."""
    url, folder = os.environ.get(CURVES_URL), os.environ.get(CURVES_FOLDER)
    curves = (config.out / "tensorboard").resolve()
    if not (url and folder):
        text = f"`tensorboard --logdir {curves}`, then [127.0.0.1:6006](http://127.0.0.1:6006)"
        create_markdown_artifact(key="train-curves", markdown=text, description="how to see the curves")
        return
    name = link_curves(curves, Path(folder))
    create_link_artifact(
        key="train-curves", link=f"{url}/?runFilter={name}#timeseries", link_text=f"TensorBoard: {name}",
        description="losses and rates while it trains",
    )  # fmt: skip


def link_curves(curves: Path, folder: Path) -> str:
    """Make `folder` lead to a run's curves, and forget runs that are gone. Returns the run's name there."""
    folder.mkdir(parents=True, exist_ok=True)
    for known in folder.iterdir():
        if known.is_symlink() and not known.readlink().parent.is_dir():
            known.unlink()
    name = f"{curves.parent.name}-{digest_of(str(curves))[:6]}"
    with suppress(FileExistsError):
        (folder / name).symlink_to(curves)
    return name
