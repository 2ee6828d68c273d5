"""Which model a body names, found without reading it whole."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence

from m7mlx_serve.errors import ApiError

_NO_MODEL = ("", "dummy", "tgi")  # the last two: huggingface_hub, where no model is given
_TAG = ":latest"
# A text that is never closed is one, too: else all would be looked at from each of its letters on.
_TOKENS = re.compile(rb'"(?:[^"\\]++|\\.)*+"?|[{}\[\]]', re.DOTALL)
_VALUE = re.compile(rb'\s*+:\s*+("(?:[^"\\]++|\\.)*+")', re.DOTALL)
_KEYS = (b'"model"', b'"name"')


def named_model(data: bytes, is_ollamas: bool) -> str:
    """The model that a body names at its top level; "" if it names none, or is no JSON.

    It says where the body is to be read; whoever reads it checks the name. Ollama's clients may say
    `name`.
    """
    keys = _KEYS if is_ollamas else _KEYS[:1]
    depth = 0
    for token in _TOKENS.finditer(data):
        text = token[0]
        if text in (b"{", b"["):
            depth += 1
        elif text in (b"}", b"]"):
            depth -= 1
        elif depth == 1 and text in keys and (value := _VALUE.match(data, token.end())):
            try:
                return str(json.loads(value[1]))
            except ValueError:
                return ""
    return ""


def meant(asked: str, names: Sequence[str]) -> str:
    """The one of the models `names` that a client means; a name that is not there stays as it is.

    Who names none means the first. Ollama's API lists models with a tag behind their names, and
    clients that have them from there use these at other APIs too, as oterm does.
    """
    if asked in _NO_MODEL:
        return names[0] if names else ""
    short = asked.removesuffix(_TAG)
    return short if asked not in names and short in names else asked


def tagged(name: str) -> str:
    """The name of a model as Ollama's API lists it."""
    return name if ":" in name else name + _TAG


def unknown_model(name: str, names: Sequence[str]) -> ApiError:
    """The error for a model that is not served; `names` are."""
    use = repr(names[0]) if len(names) == 1 else f"one of {', '.join(map(repr, names[:5]))}"
    reason = f"the model {name[:100]!r} is not served here; use {use}, or leave it out"
    return ApiError(404, reason, "model_not_found")
