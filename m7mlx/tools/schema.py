"""The JSON schema of tool calls, for a grammar that makes the model write them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

_SCHEMAS_BY_NAME = ("properties", "patternProperties", "$defs", "definitions", "dependentSchemas")
_VALUES = ("const", "enum", "default", "examples")  # no schemas, whatever they hold


def calls_schema(functions: Sequence[Mapping[str, Any]], parallel: bool) -> dict[str, Any]:
    """The JSON schema of a list of calls to these functions: at least one, or exactly one.

    Arguments are always an object. Each function's parameters become a definition of their own, in
    which their references to themselves still hold.
    """
    calls = [
        {
            "type": "object",
            "properties": {
                "name": {"const": function["name"]},
                "arguments": {"type": "object", "$ref": f"#/$defs/{i}"},
            },
            "required": ["name", "arguments"],
            "additionalProperties": False,
        }
        for i, function in enumerate(functions)
    ]
    most = {} if parallel else {"maxItems": 1}
    defs = {str(i): _moved(function["parameters"], i, _address(function)) for i, function in enumerate(functions)}
    return {"type": "array", "items": {"anyOf": calls}, "minItems": 1, **most, "$defs": defs}


def _address(function: Mapping[str, Any]) -> str:
    """The address by which a function's parameters refer to themselves; "" mostly."""
    address = function["parameters"].get("$id")
    return address.rstrip("#") if isinstance(address, str) else ""


def _moved(schema: Any, place: int, address: str) -> Any:
    """A schema whose references to itself hold where it is definition `place` of another.

    They are `#`, `#/…` or the name of an anchor, `#…`, and may follow its own address.
    """
    if isinstance(schema, list):
        return [_moved(item, place, address) for item in schema]
    if not isinstance(schema, Mapping):
        return schema
    moved: dict[str, Any] = {}
    for key, value in schema.items():
        if key in _SCHEMAS_BY_NAME and isinstance(value, Mapping):
            moved[key] = {name: _moved(item, place, address) for name, item in value.items()}
        elif key == "$ref" and isinstance(value, str):
            base, _, where = value.partition("#")
            is_own = base in ("", address)
            moved[key] = f"#{_anchor(place, where)}" if is_own else value
        elif key == "$anchor" and isinstance(value, str):
            moved[key] = _anchor(place, value)
        elif key not in ("$id", "$schema"):
            moved[key] = value if key in _VALUES else _moved(value, place, address)
    return moved


def _anchor(place: int, where: str) -> str:
    """A place within definition `place`. Anchors get a prefix: two functions may use one name."""
    return f"/$defs/{place}{where}" if where[:1] in ("", "/") else f"f{place}.{where}"
