"""Checks arguments against JSON schemas in a `m7mlx.worker.Worker`; needs jsonschema alone."""

from __future__ import annotations

import json
from collections.abc import Callable


def handler(setup: bytes) -> Callable[[bytes], bytes]:
    """Return the function that answers [schema, arguments]; there is nothing to set up."""
    return _wrong


def _wrong(question: bytes) -> bytes:
    """Say what is wrong with the arguments; nothing if they fit."""
    from jsonschema import Draft202012Validator
    from jsonschema.exceptions import SchemaError, best_match
    from referencing import Registry
    from referencing.exceptions import Unresolvable

    schema, arguments = json.loads(question)
    try:
        Draft202012Validator.check_schema(schema)
        # An empty registry fetches nothing, whatever a schema refers to.
        error = best_match(Draft202012Validator(schema, registry=Registry()).iter_errors(arguments))
    except SchemaError as wrong:
        return _line(f"the tool's schema is none: {wrong.message}")
    except Unresolvable as missing:
        return _line(f"the tool's schema refers to what is not there: {missing}")
    except Exception as other:  # a pattern that is none, nesting without end
        return _line(f"they could not be checked: {type(other).__name__}")
    if error is None:
        return b""
    place = "".join(f"[{part!r}]" for part in error.absolute_path)
    return _line(f"{place} {error.message}" if place else error.message)


def _line(text: str) -> bytes:
    return " ".join(text.split())[:300].encode("utf-8", "replace")
