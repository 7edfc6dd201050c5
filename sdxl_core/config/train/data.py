"""Which pictures are trained on, and which are kept back to measure."""

from __future__ import annotations

from pydantic import Field, model_validator

from sdxl_core.sections import Section


class DataOptions(Section):
    flip_aug: bool = Field(
        False, description="half of the samples of an epoch are mirrored; needs latents cached with flip_aug"
    )
    heldout_share: float = Field(
        0.0, ge=0, le=0.5, description="this share of the pictures is never trained on; their loss is measured"
    )
    heldout_count: int = Field(0, ge=0, description="the same as a number of pictures")
    heldout_every_steps: int = Field(
        500, ge=1, description="optimizer steps between two measurements of the held-out loss; also at start and end"
    )
    heldout_bins: int = Field(
        10, ge=1, le=100, description="the held-out loss is measured in this many equal ranges of timesteps"
    )

    @model_validator(mode="after")
    def one_way_to_hold_out(self) -> DataOptions:
        if self.heldout_share and self.heldout_count:
            raise ValueError("heldout_share and heldout_count say the same in two ways: give one of them")
        return self
