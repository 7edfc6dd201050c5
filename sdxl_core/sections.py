"""What every group of parameters has in common."""

from __future__ import annotations

from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field

Extension = Annotated[str, Field(pattern=r"^\.[A-Za-z0-9]+$")]


class Section(BaseModel):
    """Frozen, and strict about names: a misspelt parameter is an error at submit, not a silent default."""

    model_config = ConfigDict(extra="forbid", frozen=True, coerce_numbers_to_str=True, allow_inf_nan=False)
