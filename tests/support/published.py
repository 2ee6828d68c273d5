"""What is answered, compared with the shapes that other APIs publish in their own packages."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from typing import Any

from pydantic import BaseModel, TypeAdapter


def check_published(shape: TypeAdapter[Any], data: Any, also: Collection[str] = ()) -> None:
    """Assert that `data` has the shape, to the letter, and no field that the shape does not know.

    `also` are fields that the API tells although its package does not know them.
    """
    unknown = list(_unknown(shape.validate_python(data, strict=True)))
    assert {*unknown} <= {*also}, unknown


def _unknown(value: Any, place: str = "") -> Iterator[str]:
    """Where a value of a shape has fields that the shape does not know."""
    if isinstance(value, BaseModel):
        yield from (f"{place}.{name}" for name in value.model_extra or ())
        for name in type(value).model_fields:
            yield from _unknown(getattr(value, name), f"{place}.{name}")
    elif isinstance(value, list):
        for item in value:
            yield from _unknown(item, place)
