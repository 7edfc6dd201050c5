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
from sdxl_core.report.curves import tensorboard_command
from tasks.artifacts import never_failing

CURVES_URL = "SDXL_FLOWS_TENSORBOARD_URL"
CURVES_FOLDER = "SDXL_FLOWS_TENSORBOARD_FOLDER"


@never_failing("the link to the curves")
def show_curves(config: TrainConfig) -> None:
    """Before training: a link to the running TensorBoard, or the command that starts one."""
    curves = config.out / "tensorboard"
    found = _running(curves)
    if found is None:
        create_markdown_artifact(key="train-curves", markdown=curves_text(curves), description="how to see the curves")
        return
    create_link_artifact(
        key="train-curves", link=found[0], link_text=f"TensorBoard: {found[1]}",
        description="losses and rates while it trains",
    )  # fmt: skip


def curves_text(curves: Path) -> str:
    """Markdown: the curves below `curves` in the running TensorBoard, or the command that starts one."""
    found = _running(curves)
    if found is not None:
        return f"[TensorBoard: {found[1]}]({found[0]})"
    return f"`{tensorboard_command(curves.resolve())}`, then open the address that it prints"


def _running(curves: Path) -> tuple[str, str] | None:
    """Address and name of a run's curves in the TensorBoard of `up`; None without one."""
    url, folder = os.environ.get(CURVES_URL), os.environ.get(CURVES_FOLDER)
    if not (url and folder):
        return None
    name = link_curves(curves.resolve(), Path(folder))
    return f"{url}/?runFilter={name}#timeseries", name


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
