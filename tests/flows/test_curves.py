"""The folder that TensorBoard looks into."""

from pathlib import Path

from tasks.curves import link_curves


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
