"""What is shown in the browser never costs the work it tells about."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any
from uuid import uuid4

import pytest

from sdxl_core.config import SubsetConfig

pytestmark = pytest.mark.usefixtures("prefect_server")


def test_a_server_that_refuses_artifacts_does_not_stop_a_flow(
    pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import httpx

    from flows.subset import subset

    def refuse(*args: Any, **kwargs: Any) -> None:
        raise httpx.ReadTimeout("server busy")

    for name in ("create_progress_artifact", "create_table_artifact", "create_markdown_artifact"):
        monkeypatch.setattr(f"tasks.artifacts.{name}", refuse)
    ref = subset(SubsetConfig(source=pictures, query="scenery -night", how="copy", out=tmp_path / "out"))
    assert ref.num_kept == 38


def test_progress_is_shown_at_most_once_in_ten_seconds_and_the_end_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    from prefect import flow

    from tasks import artifacts

    shown: list[float] = []
    monkeypatch.setattr(artifacts, "create_progress_artifact", lambda **told: shown.append(told["progress"]) or uuid4())
    monkeypatch.setattr(artifacts, "update_progress_artifact", lambda _, **told: shown.append(told["progress"]))
    seconds = iter([0.0, 3, 6, 9.9, 10, 13, 20.5, 21])
    monkeypatch.setattr(artifacts, "time", SimpleNamespace(monotonic=lambda: next(seconds)))

    @flow
    def work() -> None:
        progress = artifacts.ProgressArtifact("anything", "done")
        for done in range(1, 9):
            progress("stage", done, 8)

    work()
    assert shown == [12.5, 62.5, 87.5, 100.0]
