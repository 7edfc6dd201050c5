"""A person with a browser: fills the form of a deployment, submits, watches it finish, opens what it shows.

With SDXL_FLOWS_SCREENSHOTS=docs/images the pictures of the documentation are taken anew.
"""

import os
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from support.service import Service
from support.system_runs import submitted_run

from sdxl_core.demo import draw_samples

selenium = pytest.importorskip("selenium", reason="selenium is not installed: pip install -e '.[dev]'")
from support.browser import Browser, browser, missing  # noqa: E402

pytestmark = [pytest.mark.system, pytest.mark.skipif(bool(missing()), reason=missing() or "-")]

FIELD = "//span[contains(@class, 'schema-form-property__label') and normalize-space()='{}']"
BOX = "/ancestor::div[contains(concat(' ', @class, ' '), ' p-label ')][1]//*[self::textarea or self::input]"

ENDED = "//*[contains(@class, 'page-heading-flow-run__meta')]//*[contains(@class, 'state--completed')]"
SHOWN = {  # by the artifact's key
    "run-report": "//img[starts-with(@src, 'data:image/jpeg')]",
    "run-lineage": "//li[contains(., 'scenery -night')]",
    "train-checkpoint": "//td[contains(., 'last.safetensors')]",
    "train-curves": "//a[contains(@href, 'runFilter=run-')]",
}


@pytest.fixture
def chromium(service: Service) -> Iterator[Browser]:
    with browser(f"http://127.0.0.1:{service.port}") as opened:
        yield opened


def fill(page: Browser, label: str, text: str) -> None:
    """Type into the field of this label, instead of what stands there."""
    box = page.find(FIELD.format(label) + BOX)
    page.driver.execute_script("arguments[0].scrollIntoView({block: 'center'})", box)
    box.send_keys("\ue009a\ue000", text)  # Ctrl-A, released


def test_a_job_is_filled_in_submitted_watched_and_looked_at(
    service: Service, chromium: Browser, tmp_path: Path
) -> None:
    page, shots = chromium, Path(os.environ.get("SDXL_FLOWS_SCREENSHOTS", tmp_path))
    draw_samples(tmp_path / "pictures")
    with service.client() as client:
        deployment = client.read_deployment_by_name("pipeline/pipeline").id
    page.open(f"/deployments/deployment/{deployment}/run")
    assert page.find("//div[contains(text(), 'folder that receives everything the job makes')]")
    fill(page, "Out", str(tmp_path / "run"))
    fill(page, "Path", str(tmp_path / "pictures"))
    fill(page, "Tag query (Optional)", "scenery -night")
    for label, number in (
        ("Resolution Px", 128),
        ("Min Bucket Px", 64),
        ("Max Bucket Px", 256),
        ("Max Train Steps", 4),
    ):
        fill(page, f"{label} (Optional)", str(number))
    page.driver.execute_script("arguments[0].scrollIntoView()", page.find(FIELD.format("Out")))
    page.shoot(shots / "browser_form.png")
    page.click("//button[@type='submit']")

    run = submitted_run(service, deployment, "job", {"out": str(tmp_path / "run")})
    page.click(f"//a[contains(@href, '/runs/flow-run/{run}')]")  # other tests' runs are listed beside it
    service.wait_for(run, "Completed", timeout_s=600)
    page.find(ENDED)  # without being asked again
    page.open(f"/runs/flow-run/{run}")  # the timeline of the whole run
    page.find(ENDED)
    time.sleep(3)  # while it is drawn
    page.shoot(shots / "browser_run.png")
    assert (tmp_path / "run" / "model" / "last.safetensors").is_file()

    for key in SHOWN:
        open_artifact(page, service, key)
        page.shoot(shots / f"browser_{key.replace('-', '_')}.png")
        cell = page.find(SHOWN[key])
        if cell.tag_name == "img":
            assert page.driver.execute_script("return arguments[0].naturalWidth", cell) > 100
    page.open((tmp_path / "run" / "lineage.html").as_uri())
    assert page.find("//li[contains(., 'scenery -night')]")
    page.shoot(shots / "browser_lineage_page.png")


def open_artifact(page: Browser, service: Service, key: str) -> None:
    """The newest of this key, on its own page, where the run's timeline and its tab Artifacts lead."""
    from prefect.client.schemas.filters import ArtifactFilter, ArtifactFilterKey
    from prefect.client.schemas.sorting import ArtifactSort

    with service.client() as client:
        newest = client.read_artifacts(
            artifact_filter=ArtifactFilter(key=ArtifactFilterKey(any_=[key])), sort=ArtifactSort.CREATED_DESC, limit=1
        )
    page.open(f"/artifacts/artifact/{newest[0].id}")
    page.find(f"//*[normalize-space()='{key}']")


def test_a_number_out_of_bounds_is_refused_by_the_form(service: Service, chromium: Browser, tmp_path: Path) -> None:
    with service.client() as client:
        deployment = client.read_deployment_by_name("merge-tags/merge-tags").id
    chromium.open(f"/deployments/deployment/{deployment}/run")
    fill(chromium, "Source", str(tmp_path))
    fill(chromium, "Out", str(tmp_path / "m.json"))
    fill(chromium, "Num Shards (Optional)", "0")
    chromium.click("//button[@type='submit']")
    chromium.find("//*[contains(text(), '0 is less than the minimum of 1')]")
