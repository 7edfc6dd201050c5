"""What is tried again and what is not, and how shards that failed for good are worked on alone."""

import json
import re
from pathlib import Path
from urllib.parse import unquote
from uuid import UUID

import pytest
from support.service import Service
from support.system_runs import failed_shards_of, task_runs_of

pytestmark = pytest.mark.system


def test_shards_that_failed_for_good_are_listed_and_started_again_by_a_link(service: Service, tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    for number in range(8):
        (tmp_path / "in" / f"{number}.png").write_bytes(b"never opened by merging")
        (tmp_path / "in" / f"{number}.txt").write_text(f"tag {number}")
    config = {"source": str(tmp_path / "in"), "out": str(tmp_path / "m.json"), "num_shards": 4}
    service.wait_for(service.submit("merge-tags/merge-tags", {"config": config}), "Completed")
    whole = (tmp_path / "m.json").read_bytes()
    blocked = sorted((tmp_path / ".m.json.work").glob("*.fragment"))[:2]
    for path in blocked:  # a mistake that no waiting mends
        path.unlink()
        (path / "in the way").mkdir(parents=True)
    run = service.submit("merge-tags/merge-tags", {"config": config})
    service.wait_for(run, "Failed")
    shards = [task for task in task_runs_of(service, run, 5) if task.name.startswith("merge-shard")]
    assert sorted(task.state_name for task in shards) == ["Cached", "Cached", "Failed", "Failed"]
    assert all(task.run_count == 1 for task in shards if task.state_name == "Failed"), "a mistake was tried again"

    listed = failed_shards_of(service, run)
    assert all(path.name in listed for path in blocked)
    link = re.search(r"\(/deployments/deployment/([0-9a-f-]+)/run\?parameters=([^)]+)\)", listed)
    assert link is not None, listed
    for path in blocked:
        (path / "in the way").rmdir()
        path.rmdir()
    with service.client() as client:  # what the form that the link opens submits
        again = client.create_flow_run_from_deployment(
            UUID(link[1]), parameters=json.loads(unquote(unquote(link[2])))
        ).id
    service.wait_for(again, "Completed")
    shards = [task for task in task_runs_of(service, again, 6) if task.name.startswith("merge-shard")]
    assert sorted(task.state_name for task in shards) == ["Cached", "Cached", "Completed", "Completed"]
    assert (tmp_path / "m.json").read_bytes() == whole
