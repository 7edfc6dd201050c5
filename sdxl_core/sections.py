"""What every group of parameters has in common."""

from __future__ import annotations

from typing import Annotated, Self

from pydantic import BaseModel, ConfigDict, Field, GetJsonSchemaHandler, model_validator
from pydantic.json_schema import JsonSchemaValue
from pydantic_core import CoreSchema

from sdxl_core.parameters import with_bounds
from sdxl_core.roots import NamesFile, check_inside_roots

WeightsName = Annotated[str, NamesFile("tiny")]
Extension = Annotated[str, Field(pattern=r"^\.[A-Za-z0-9]+$")]


class Section(BaseModel):
    """Frozen, and strict about names: a misspelt parameter is an error at submit, not a silent default."""

    model_config = ConfigDict(extra="forbid", frozen=True, coerce_numbers_to_str=True, allow_inf_nan=False)

    @classmethod
    def __get_pydantic_json_schema__(cls, core_schema: CoreSchema, handler: GetJsonSchemaHandler) -> JsonSchemaValue:
        """Fields in the order of a form: what is needed first, then the section's own, then what it inherits.

        Descriptions end with the field's bounds: the form shows them nowhere else.
        """
        schema = handler(core_schema)
        section = handler.resolve_ref_schema(schema)
        fields, needed, own = section.get("properties", {}), section.get("required", []), [*cls.__annotations__]
        order = sorted(fields, key=lambda name: (name not in needed, own.index(name) if name in own else len(own)))
        # Prefect on PostgreSQL keeps no order of keys, but the form sorts by position.
        section["properties"] = {
            name: with_bounds(fields[name]) | {"position": place} for place, name in enumerate(order)
        }
        return schema

    @model_validator(mode="after")
    def inside_data_roots(self) -> Self:
        check_inside_roots(self)
        return self
