"""deployments/prefect.yaml deploys flows that exist, and their forms show every parameter with its help."""

import importlib
from pathlib import Path
from typing import Any

import pytest
import yaml

ROOT = Path(__file__).parents[2]
DEPLOYMENTS = yaml.safe_load((ROOT / "deployments" / "prefect.yaml").read_text())["deployments"]


def schema_of(deployment: dict[str, Any]) -> dict[str, Any]:
    """The form's schema, as deploying makes it."""
    from prefect.utilities.callables import parameter_schema

    path, _, name = deployment["entrypoint"].partition(":")
    assert (ROOT / path).is_file()
    flow = getattr(importlib.import_module(path.removesuffix(".py").replace("/", ".")), name)
    schema: dict[str, Any] = parameter_schema(flow.fn).model_dump()
    return schema


def test_every_flow_that_people_start_is_deployed() -> None:
    names = {deployment["name"] for deployment in DEPLOYMENTS}
    assert names >= {"pipeline", "subset", "merge-tags", "cache-latents", "finetune", "verify-latents", "plan"}
    assert all("sdxl-flows" in deployment["tags"] for deployment in DEPLOYMENTS)


def test_caching_and_verifying_have_a_paused_nightly_schedule_with_a_time_zone() -> None:
    nightly = {deployment["name"]: deployment["schedules"] for deployment in DEPLOYMENTS if "schedules" in deployment}
    assert set(nightly) == {"cache-latents", "verify-latents"}
    for (schedule,) in nightly.values():
        assert schedule["active"] is False and "/" in schedule["timezone"] and schedule["cron"].endswith(" * * *")


@pytest.mark.parametrize("deployment", DEPLOYMENTS, ids=lambda deployment: deployment["name"])
def test_the_form_shows_every_parameter_with_help(deployment: dict[str, Any]) -> None:
    schema = schema_of(deployment)
    models = schema["definitions"]
    assert len(schema["properties"]) == 1 and models
    for model in models.values():
        for field, shown in model["properties"].items():
            assert shown.get("description") and (shown.get("title") or "$ref" in shown), f"{model['title']}.{field}"
        assert model["additionalProperties"] is False


@pytest.mark.parametrize("deployment", DEPLOYMENTS, ids=lambda deployment: deployment["name"])
def test_the_form_begins_with_what_is_needed(deployment: dict[str, Any]) -> None:
    """The browser sorts by position; without one it keeps the server's order, which PostgreSQL does not keep."""
    for model in schema_of(deployment)["definitions"].values():
        fields, needed = model["properties"], model.get("required", [])
        order = sorted(fields, key=lambda name: fields[name]["position"])
        assert order == list(fields) and set(order[: len(needed)]) == set(needed), model["title"]
        assert all("default" in fields[name] for name in order[len(needed) :]), model["title"]


def test_the_form_of_caching_asks_for_the_paths_first() -> None:
    caching = next(deployment for deployment in DEPLOYMENTS if deployment["name"] == "cache-latents")
    assert list(schema_of(caching)["definitions"]["CacheLatentsConfig"]["properties"])[:5] == [
        "source", "metadata", "out", "vae", "manifest",
    ]  # fmt: skip


def test_numbers_show_their_bounds() -> None:
    caching = next(deployment for deployment in DEPLOYMENTS if deployment["name"] == "cache-latents")
    fields = schema_of(caching)["definitions"]["CacheLatentsConfig"]["properties"]
    assert (fields["resolution_px"]["minimum"], fields["resolution_px"]["maximum"]) == (64, 8192)
    assert fields["engine"]["enum"] == ["processes", "ray"]
