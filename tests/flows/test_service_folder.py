"""The folder of a service: one service at a time, and a clear word where it cannot be written."""

from pathlib import Path

import pytest

from flows.service.record import claimed_folder
from sdxl_core.errors import ConfigError


def test_two_services_at_once_are_refused_and_the_next_is_not(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SDXL_FLOWS_HOME", str(tmp_path / "new" / "home"))
    with claimed_folder(), pytest.raises(ConfigError, match=r"another `sdxl-flows up` holds .*home"), claimed_folder():
        pass
    with claimed_folder():
        assert (tmp_path / "new" / "home").is_dir()


def test_a_folder_that_cannot_be_written_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("SDXL_FLOWS_HOME", str(tmp_path / "file" / "home"))
    with (
        pytest.raises(ConfigError, match=r"cannot be written \(Not a directory\)\. .*SDXL_FLOWS_HOME"),
        claimed_folder(),
    ):
        pass
