"""deployments/prefect.yaml deploys flows that exist, and their forms show every parameter with its help."""

import importlib
from pathlib import Path
from typing import Any

import pytest
import yaml

ROOT = Path(__file__).parents[2]
DEPLOYMENTS = yaml.safe_load((ROOT / "deployments" / "prefect.yaml").read_text())["deployments"]


@pytest.mark.parametrize("deployment", DEPLOYMENTS, ids=lambda deployment: deployment["name"])
def test_the_form_shows_every_parameter_with_help(deployment: dict[str, Any]) -> None:
    from prefect.utilities.callables import parameter_schema

    path, _, name = deployment["entrypoint"].partition(":")
    assert (ROOT / path).is_file()
    flow = getattr(importlib.import_module(path.removesuffix(".py").replace("/", ".")), name)
    schema = parameter_schema(flow.fn).model_dump()
    models = schema["definitions"]
    assert len(schema["properties"]) == 1 and models
    for model in models.values():
        for field, shown in model["properties"].items():
            assert "description" in shown, f"{model['title']}.{field}"
