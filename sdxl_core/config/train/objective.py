"""What a step minimises."""

from __future__ import annotations

from pydantic import Field

from sdxl_core.sections import Section


class ObjectiveOptions(Section):
    noise_offset: float = Field(0.0, ge=0, le=1, description="adds this times one normal value a channel to the noise")
    min_snr_gamma: float | None = Field(None, gt=0, description="min-SNR loss weighting (arXiv:2303.09556); 5 is usual")
