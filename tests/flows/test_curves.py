"""The folder that TensorBoard looks into."""

from pathlib import Path

import pytest

from tasks.curves import CURVES_FOLDER, CURVES_URL, curves_text, link_curves


def test_runs_are_linked_under_names_of_their_own_and_forgotten_when_they_are_gone(tmp_path: Path) -> None:
    folder = tmp_path / "curves"
    for place in ("a", "b"):
        (tmp_path / place / "run" / "tensorboard").mkdir(parents=True)
    first, second = (link_curves(tmp_path / place / "run" / "tensorboard", folder) for place in ("a", "b"))
    assert first != second and first.startswith("run-")
    assert link_curves(tmp_path / "a" / "run" / "tensorboard", folder) == first
    assert sorted(path.name for path in folder.iterdir()) == sorted([first, second])
    (tmp_path / "a" / "run" / "tensorboard").rmdir()
    (tmp_path / "a" / "run").rmdir()
    link_curves(tmp_path / "b" / "run" / "tensorboard", folder)
    assert [path.name for path in folder.iterdir()] == [second]


def test_curves_are_in_the_running_tensorboard_or_a_command_away(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv(CURVES_URL, raising=False)
    monkeypatch.chdir(tmp_path)
    assert f"/tensorboard --logdir {tmp_path}/run/tensorboard`" in curves_text(Path("run/tensorboard"))
    monkeypatch.setenv(CURVES_URL, "http://127.0.0.1:6007")
    monkeypatch.setenv(CURVES_FOLDER, str(tmp_path / "curves"))
    linked = curves_text(Path("run/tensorboard"))
    (name,) = [path.name for path in (tmp_path / "curves").iterdir()]
    assert linked == f"[TensorBoard: {name}](http://127.0.0.1:6007/?runFilter={name}#timeseries)"
