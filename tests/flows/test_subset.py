"""The subset flow: shards fan out, finished ones are Cached, what was removed behind our back is placed again."""

from pathlib import Path

import pytest
from prefect.client.orchestration import get_client
from support.pictures import encoded, picture
from support.runs import task_states

from sdxl_core.config import JobConfig, SubsetConfig
from sdxl_core.subset.stage import subset as core

pytestmark = pytest.mark.usefixtures("prefect_server")


def test_a_shard_is_placed_once_and_again_when_a_file_is_gone(tmp_path: Path) -> None:
    from flows.subset import subset

    (tmp_path / "in").mkdir()
    for number in range(6):
        (tmp_path / "in" / f"{number}.png").write_bytes(b"picture %d" % number)
        (tmp_path / "in" / f"{number}.txt").write_text("red")
    config = SubsetConfig(source=tmp_path / "in", query="red", how="copy", out=tmp_path / "out", shard_size=2)
    first = subset(config)
    assert first.num_kept == 6
    assert task_states("subset", num_tasks=5)["place-shard: Completed"] == 3
    with get_client(sync_client=True) as client:
        told = [artifact.description or "" for artifact in client.read_artifacts()]
    assert any(text.startswith("parts of the folder read: 1 of 1") for text in told), told
    assert subset(config) == first
    assert task_states("subset", num_tasks=5)["place-shard: Cached"] == 3
    (tmp_path / "out" / "3.txt").unlink()
    assert subset(config) == first
    states = task_states("subset", num_tasks=5)
    assert (states["place-shard: Cached"], states["place-shard: Completed"]) == (2, 1)
    assert (tmp_path / "out" / "3.txt").read_text() == "red"
    before = {path: path.stat().st_ino for path in (tmp_path / "out").rglob("*")}
    assert core(config) == first, "the command goes on with what the flow made"
    assert {path: path.stat().st_ino for path in (tmp_path / "out").rglob("*")} == before
    listed = subset(config.model_copy(update={"how": "manifest", "out": tmp_path / "list"}))
    assert listed.num_kept == 6 and task_states("subset", num_tasks=1) == {"subset red: Completed": 1}


def test_a_jobs_query_by_width_picks_of_a_folder(tmp_path: Path) -> None:
    """The stage as the pipeline runs it; what reading headers is at is told."""
    from flows.subset import subset

    (tmp_path / "in").mkdir()
    for number in range(6):
        (tmp_path / "in" / f"{number}.png").write_bytes(encoded(picture(40 + 10 * number, 30), "PNG"))
        (tmp_path / "in" / f"{number}.txt").write_text("red")
    job = JobConfig.model_validate(
        {"out": tmp_path / "run", "source": {"path": tmp_path / "in"}, "subset": {"query": "red width:>=70"}}
    )
    picked = subset(job.subset_config())
    assert (picked.num_kept, picked.num_unmatched, picked.how) == (3, 3, "manifest")
    with get_client(sync_client=True) as client:
        told = [artifact.description or "" for artifact in client.read_artifacts()]
    assert any(text.startswith("headers of pictures read: 6 of 6") for text in told), told
