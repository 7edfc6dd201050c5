"""The statistics flow: its tables are an artifact in the browser."""

from pathlib import Path

import pytest

from sdxl_core.catalog.build import build_catalog
from sdxl_core.catalog.config import CatalogConfig, CatalogSource
from sdxl_core.config import StatisticsConfig

pytestmark = pytest.mark.usefixtures("prefect_server")


def test_the_tables_are_shown_as_an_artifact(tmp_path: Path) -> None:
    from prefect.artifacts import Artifact

    from flows.statistics import statistics

    (tmp_path / "in").mkdir()
    for number in range(3):
        (tmp_path / "in" / f"{number}.png").write_bytes(b"picture")
        (tmp_path / "in" / f"{number}.txt").write_text("1girl, solo")
    build_catalog(CatalogConfig(sources=(CatalogSource(path=tmp_path / "in"),), out=tmp_path / "catalog"))
    ref = statistics(StatisticsConfig(source=tmp_path / "catalog", out=tmp_path / "out"))
    artifact = Artifact.get("statistics-tables")
    assert artifact is not None and artifact.data == ref.tables.read_text()
    assert "| 1girl | 3 | 100.0% |" in str(artifact.data)
