"""Shards that fail for good are listed with their reasons, and the next run works on them alone."""

import json
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import pytest
from support.runs import task_states

from sdxl_core.config import MergeTagsConfig
from sdxl_core.errors import SdxlFlowsError

pytestmark = pytest.mark.usefixtures("prefect_server")


def test_failed_shards_are_listed_and_only_they_are_run_again(tmp_path: Path) -> None:
    from prefect.client.orchestration import get_client
    from prefect.client.schemas.filters import ArtifactFilter, ArtifactFilterKey

    from flows.merge_tags import merge_tags

    (tmp_path / "in").mkdir()
    for number in range(8):
        (tmp_path / "in" / f"{number}.png").write_bytes(b"never opened by merging")
        (tmp_path / "in" / f"{number}.txt").write_text(f"tag {number}")
    config = MergeTagsConfig(source=tmp_path / "in", out=tmp_path / "m.json", num_shards=4)
    first = merge_tags(config)
    blocked = sorted((tmp_path / ".m.json.work").glob("*.fragment"))[:2]
    for path in blocked:  # nothing can be written here, however often it is tried
        path.unlink()
        (path / "in the way").mkdir(parents=True)
    with pytest.raises(SdxlFlowsError, match="2 of 4 shards failed") as told:
        merge_tags(config)
    assert all(path.name in str(told.value) for path in blocked) and "Retry this run" in str(told.value)
    with get_client(sync_client=True) as client:
        shown = client.read_artifacts(artifact_filter=ArtifactFilter(key=ArtifactFilterKey(any_=["failed-shards"])))
    assert len(shown) == 1 and all(path.name in str(shown[0].data) for path in blocked)
    for path in blocked:
        (path / "in the way").rmdir()
        path.rmdir()
    assert merge_tags(config) == first
    states = task_states("merge-tags", num_tasks=6)
    assert (states["merge-shard: Completed"], states["merge-shard: Cached"]) == (2, 2)


@pytest.mark.parametrize(
    ("parameters", "expected"),
    [
        ({"config": {"out": "o", "only_shards": [1, 2, 3]}}, {"config": {"out": "o", "only_shards": [2]}}),
        ({"job": {"out": "o"}}, {"job": {"out": "o", "latents": {"only_shards": [2]}}}),
        ({"job": {"latents": {"dtype": "float16"}}}, {"job": {"latents": {"dtype": "float16", "only_shards": [2]}}}),
    ],
)
def test_the_link_sets_the_parameter_where_the_started_run_has_it(
    parameters: dict[str, Any], expected: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    from prefect import flow
    from prefect.client.orchestration import get_client

    from tasks.artifacts import run_again_link

    @flow
    def anything(**parameters: Any) -> None: ...

    with get_client(sync_client=True) as client:
        deployment = client.create_deployment(client.create_flow(anything), name="of a test")
        run = client.create_flow_run_from_deployment(deployment, parameters=parameters)
    monkeypatch.setenv("PREFECT__RUNTIME__FLOW_RUN__ROOT_FLOW_RUN_ID", str(run.id))
    link, _, filled_in = run_again_link([2]).partition("?parameters=")
    assert link == f"/deployments/deployment/{deployment}/run"
    assert json.loads(unquote(unquote(filled_in))) == expected
