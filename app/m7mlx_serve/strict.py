"""Shapes of what strangers send: known fields alone, and a million mistakes cost little."""

from __future__ import annotations

from typing import Annotated, Any, ClassVar

from pydantic import BaseModel, ConfigDict, Field, model_validator

# Characters of all messages and tools together, or of a prompt: more than any model can see.
MAX_TEXT = 1_000_000
Text = Annotated[str, Field(max_length=MAX_TEXT)]
Name = Annotated[str, Field(max_length=200)]
Finite = Annotated[float, Field(allow_inf_nan=False)]


class Strict(BaseModel):
    """A shape whose unknown fields are refused: the first of them, since there may be millions.

    In the same way, lists are declared with `fail_fast`.
    """

    model_config = ConfigDict(extra="forbid", strict=True)
    ignored: ClassVar[frozenset[str]] = frozenset()  # fields that are known and not kept

    @model_validator(mode="before")
    @classmethod
    def _knows_all_fields(cls, data: Any) -> Any:
        if isinstance(data, dict):
            known = {field.alias or name for name, field in cls.model_fields.items()} | cls.ignored
            if unknown := next((name for name in data if name not in known), None):
                raise ValueError(f"there is no field {unknown[:100]!r}")
        return data
