"""What every group of parameters has in common."""

from __future__ import annotations

from typing import Annotated, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

from sdxl_core.roots import NamesFile, check_inside_roots

WeightsName = Annotated[str, NamesFile("tiny")]
Extension = Annotated[str, Field(pattern=r"^\.[A-Za-z0-9]+$")]


class Section(BaseModel):
    """Frozen, and strict about names: a misspelt parameter is an error at submit, not a silent default."""

    model_config = ConfigDict(extra="forbid", frozen=True, coerce_numbers_to_str=True, allow_inf_nan=False)

    @model_validator(mode="after")
    def inside_data_roots(self) -> Self:
        check_inside_roots(self)
        return self
