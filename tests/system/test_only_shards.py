"""Latent shards that failed for good: the list's link starts these alone, by their numbers."""

import json
import re
from pathlib import Path
from urllib.parse import unquote
from uuid import UUID

import pytest
from support.service import Service
from support.system_runs import (
    SMALL,
    failed_shards_of,
    latents_config,
    latents_of,
    parameters,
    submitted_run,
    task_runs_of,
)

from sdxl_core.latents.cache import plan_latents
from sdxl_core.latents.quarantine import ENDING
from sdxl_core.latents.rows import shard_file
from sdxl_core.lock import output_lock

selenium = pytest.importorskip("selenium", reason="selenium is not installed: pip install -e '.[dev]'")
from support.browser import browser, missing  # noqa: E402

pytestmark = [pytest.mark.system, pytest.mark.skipif(bool(missing()), reason=missing() or "-")]


def shards_of(service: Service, run: UUID, num: int) -> dict[str, str]:
    """Of a run with so many tasks."""
    tasks = task_runs_of(service, run, num)
    return {task.name: task.state_name for task in tasks if task.name.startswith("encode-shard")}


def submit_the_form(service: Service, link: str) -> None:
    """Follow the link in Chromium and press Submit."""
    with browser(f"http://127.0.0.1:{service.port}") as page:
        page.open(link)
        page.find(
            "//span[contains(@class, 'schema-form-property__label') and normalize-space()='Only shards (Optional)']"
        )
        page.click("//button[@type='submit']")
        page.find("//a[contains(@href, '/runs/flow-run/')]")


def test_the_link_of_failed_latent_shards_works_on_them_alone(service: Service, pictures: Path, tmp_path: Path) -> None:
    config = latents_config(pictures, tmp_path, **SMALL, shard_size=12)
    with output_lock(tmp_path / "latents", purpose="see what the shards are called"):
        plan = plan_latents(config)
    in_the_way = [shard_file(plan.shards[number].path, ENDING) for number in (1, 3)]
    for path in in_the_way:  # of the note that a shard is begun: a mistake that no waiting mends
        (path / "something").mkdir(parents=True)
    run = service.submit("cache-latents/cache-latents", parameters(config))
    service.wait_for(run, "Failed")
    assert shards_of(service, run, 6) == {
        "encode-shard-0": "Completed", "encode-shard-1": "Failed", "encode-shard-2": "Completed",
        "encode-shard-3": "Failed", "encode-shard-4": "Completed",
    }  # fmt: skip
    listed = failed_shards_of(service, run)
    assert "`only_shards = 1,3`" in listed and all(path.name in listed for path in in_the_way), listed
    link = re.search(r"\(/deployments/deployment/([0-9a-f-]+)/run\?parameters=([^)]+)\)", listed)
    assert link is not None, listed
    for path in in_the_way:
        (path / "something").rmdir()
        path.rmdir()
    submitted = json.loads(unquote(unquote(link[2])))
    assert submitted == {"config": parameters(config)["config"] | {"only_shards": [1, 3]}}
    submit_the_form(service, link[0].strip("()"))
    again = submitted_run(service, UUID(link[1]), "config", {"out": str(tmp_path), "only_shards": [1, 3]})
    service.wait_for(again, "Completed")
    assert shards_of(service, again, 4) == {"encode-shard-1": "Completed", "encode-shard-3": "Completed"}
    assert len(json.loads((tmp_path / "meta_lat.json").read_bytes())) == len(latents_of(tmp_path)) == 48
