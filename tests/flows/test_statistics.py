"""The statistics flow: its tables are an artifact in the browser."""

from pathlib import Path

import pytest

from sdxl_core.catalog.build import build_catalog
from sdxl_core.catalog.config import CatalogConfig, CatalogSource
from sdxl_core.config import StatisticsConfig

pytestmark = pytest.mark.usefixtures("prefect_server")


def test_the_tables_are_shown_as_an_artifact(tmp_path: Path) -> None:
    from prefect.client.orchestration import get_client
    from prefect.client.schemas.filters import ArtifactFilter, ArtifactFilterKey

    from flows.statistics import statistics

    (tmp_path / "in").mkdir()
    for number in range(3):
        (tmp_path / "in" / f"{number}.png").write_bytes(b"picture")
        (tmp_path / "in" / f"{number}.txt").write_text("1girl, solo")
    build_catalog(CatalogConfig(sources=(CatalogSource(path=tmp_path / "in"),), out=tmp_path / "catalog"))
    ref = statistics(StatisticsConfig(source=tmp_path / "catalog", out=tmp_path / "out"))
    with get_client(sync_client=True) as client:
        shown = client.read_artifacts(artifact_filter=ArtifactFilter(key=ArtifactFilterKey(any_=["statistics-tables"])))
    assert [artifact.data for artifact in shown] == [ref.tables.read_text()]
    assert "| 1girl | 3 | 100.0% |" in str(shown[0].data)
