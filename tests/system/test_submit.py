"""A run that is wrong is refused when it is submitted, or before it works: on the server, for every flow."""

import json
from pathlib import Path
from typing import Any
from uuid import UUID

import pytest
from prefect.client.schemas.filters import ArtifactFilter, ArtifactFilterFlowRunId
from prefect.exceptions import PrefectHTTPStatusError
from support.service import Service, wait_until

pytestmark = pytest.mark.system

PATHS = {"source": "/data/nowhere", "metadata": "/data/nowhere/meta.json", "out": "/data/out", "vae": "tiny"}
REFUSED: list[tuple[str, dict[str, Any], str]] = [
    ("cache-latents/cache-latents", PATHS | {"resolution_px": 3}, "resolution_px"),
    ("cache-latents/cache-latents", PATHS | {"engine": "dask"}, "engine"),
    ("cache-latents/cache-latents", PATHS | {"batch_size": "many"}, "batch_size"),
    ("cache-latents/cache-latents", PATHS | {"resolutoin_px": 512}, "resolutoin_px"),
    ("cache-latents/cache-latents", {"source": "/data/nowhere", "out": "/data/out", "vae": "tiny"}, "metadata"),
    ("finetune/finetune", {"metadata": "/m.json", "latents": "/data", "out": "/o", "source": "/data"}, "source"),
    ("plan/plan", {"card_gb": -1}, "card_gb"),
]


@pytest.mark.parametrize(("deployment", "config", "field"), REFUSED, ids=lambda value: value if "/" in value else "")
def test_a_wrong_value_or_name_is_refused_at_submit(
    service: Service, deployment: str, config: dict[str, Any], field: str
) -> None:
    with pytest.raises(PrefectHTTPStatusError) as refused:
        service.submit(deployment, {"config": config})
    assert field in refused.value.response.text


def test_an_unknown_name_beside_the_section_is_refused_at_submit(service: Service) -> None:
    with pytest.raises(PrefectHTTPStatusError) as refused:
        service.submit("plan/plan", {"config": {}, "confg": {"card_gb": 24}})
    assert "confg" in refused.value.response.text


def message_of(service: Service, run: UUID) -> str:
    """How a run that fails says why, once it has."""

    def look() -> str | None:
        with service.client() as client:
            state = client.read_flow_run(run).state
        assert state is not None and not state.is_completed()
        return f"{state.name}: {state.message}" if state.is_final() else None

    return str(wait_until(look, timeout_s=300, what=f"the end of run {run}"))


def test_a_missing_file_or_folder_is_told_before_anything_is_made(service: Service, tmp_path: Path) -> None:
    nowhere, out = str(tmp_path / "nowhere"), str(tmp_path / "out")
    wrong: dict[str, dict[str, Any]] = {
        "pipeline/pipeline": {"job": {"source": {"path": nowhere}, "out": out}},
        "subset/subset": {"config": {"source": nowhere, "out": out}},
        "merge-tags/merge-tags": {"config": {"source": nowhere, "out": f"{out}/m.json"}},
        "cache-latents/cache-latents": {
            "config": {"source": str(tmp_path), "metadata": nowhere, "out": out, "vae": "tiny"}
        },
        "finetune/finetune": {"config": {"metadata": nowhere, "latents": str(tmp_path), "out": out}},
        "verify-latents/verify-latents": {"config": {"path": nowhere}},
    }
    runs = {deployment: service.submit(deployment, parameters) for deployment, parameters in wrong.items()}
    for deployment, run in runs.items():
        said = message_of(service, run)
        assert said.startswith("Failed"), (deployment, said)
        assert nowhere in said, (deployment, said)
    assert not list(tmp_path.rglob("*.npz")) and not list(tmp_path.rglob("*.json"))


def test_a_plan_shows_its_bytes_and_refuses_what_cannot_fit(service: Service) -> None:
    fits, too_large = (
        service.submit("plan/plan", {"config": {"base_model": "tiny", "card_gb": size}}) for size in (24, 1.2)
    )
    service.wait_for(fits, "Completed")
    said = message_of(service, too_large)
    assert "The cheapest change that fits: cache_text_encoder_outputs = true" in said
    with service.client() as client:
        shown = client.read_artifacts(artifact_filter=ArtifactFilter(flow_run_id=ArtifactFilterFlowRunId(any_=[fits])))
    rows = {(row["where"], row["what"]): row["bytes"] for row in json.loads(str(shown[0].data))}
    assert rows["each card", "together"] > rows["each card", "weights: U-Net"] > 0
