"""Shapes of what strangers send: known fields alone, and a million mistakes cost little."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Annotated, Any, ClassVar

from pydantic import BaseModel, ConfigDict, Field, model_validator

# Characters of all messages and tools together, or of a prompt: more than any model can see.
MAX_TEXT = 1_000_000
Text = Annotated[str, Field(max_length=MAX_TEXT)]
Name = Annotated[str, Field(max_length=200)]
Finite = Annotated[float, Field(allow_inf_nan=False)]


class Strict(BaseModel):
    """A shape whose unknown fields are refused: the first of them, since there may be millions.

    In the same way, lists are declared with `fail_fast`. A field of any name that is null says
    nothing, and is left out.

    ignored  fields that change nothing here, whatever they say
    neutral  fields that are known with these values alone, which ask for what is done anyway
    advice   of fields that are refused: what to use instead
    """

    model_config = ConfigDict(extra="forbid", strict=True)
    ignored: ClassVar[frozenset[str]] = frozenset()
    neutral: ClassVar[Mapping[str, Sequence[Any]]] = {}
    advice: ClassVar[Mapping[str, str]] = {}

    @model_validator(mode="before")
    @classmethod
    def _takes_what_asks_for_nothing(cls, data: Any) -> Any:
        if not isinstance(data, dict):
            return data
        known = {field.alias or name for name, field in cls.model_fields.items()}
        kept = {}
        for name, value in data.items():
            if value is None or name in cls.ignored:
                continue
            if name in cls.neutral and any(_is_same(value, one) for one in cls.neutral[name]):
                continue
            if name not in known:
                raise ValueError(cls._refusal(name))
            kept[name] = value
        return kept

    @classmethod
    def _refusal(cls, name: str) -> str:
        if name in cls.advice:
            return f"{name}: {cls.advice[name]}"
        if name in cls.neutral:
            values = " or ".join(repr(value) for value in cls.neutral[name])
            return f"{name} can only be {values} here; leave it out"
        return f"there is no field {name[:100]!r}; leave it out"


def _is_same(value: Any, other: Any) -> bool:
    """Whether two values of JSON are equal; true is not 1."""
    return isinstance(value, bool) == isinstance(other, bool) and value == other
