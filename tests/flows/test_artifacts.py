"""What is shown in the browser never costs the work it tells about."""

from pathlib import Path
from typing import Any

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
