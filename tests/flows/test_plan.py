"""The memory plan as a flow: bytes by component to look at, and a refusal that names the cheapest change."""

import json

import pytest

from sdxl_core.config import PlanConfig
from sdxl_core.errors import ConfigError

pytestmark = pytest.mark.usefixtures("prefect_server")


def test_the_plan_is_shown_and_what_cannot_fit_is_refused_with_the_cheapest_change() -> None:
    from prefect.client.orchestration import get_client
    from prefect.client.schemas.filters import ArtifactFilter, ArtifactFilterKey

    from flows.plan import plan

    found = plan(PlanConfig(base_model="tiny", card_gb=24))
    assert found.card_bytes > found.card["weights: U-Net"] > 0
    with pytest.raises(
        ConfigError, match=r"The cheapest change that fits: cache_text_encoder_outputs = true and fused_backward = true"
    ):
        plan(PlanConfig(base_model="tiny", card_gb=1.2))
    with get_client(sync_client=True) as client:
        shown = client.read_artifacts(artifact_filter=ArtifactFilter(key=ArtifactFilterKey(any_=["memory-plan"])))
    assert len(shown) == 2, "what was refused is shown too"
    rows = json.loads(str(shown[0].data))
    assert {(row["where"], row["what"]): row["bytes"] for row in rows}[("each card", "together")] == found.card_bytes
