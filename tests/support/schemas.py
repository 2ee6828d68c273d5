"""JSON schemas that tests and benchmarks ask answers to fit."""

from __future__ import annotations

from typing import Any


def object_of(**properties: dict[str, Any]) -> dict[str, Any]:
    """The schema of an object with these properties, all of them and no others."""
    return {
        "type": "object",
        "properties": properties,
        "required": [*properties],
        "additionalProperties": False,
    }


PERSON = object_of(
    name={"type": "string", "maxLength": 8},
    age={"type": "integer", "minimum": 0, "maximum": 99},
)
