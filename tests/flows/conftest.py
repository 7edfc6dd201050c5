"""One Prefect test server for all flow tests, and a small drawn collection."""

from collections.abc import Iterator
from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def prefect_server() -> Iterator[None]:
    from prefect.testing.utilities import prefect_test_harness

    import tasks  # noqa: F401  (the project's Prefect settings)

    with prefect_test_harness(server_startup_timeout=120):
        yield


@pytest.fixture(scope="session")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from sdxl_core.demo import draw_samples

    folder = tmp_path_factory.mktemp("collection") / "pictures"
    draw_samples(folder)
    return folder
