"""Tool calls in Mistral's v3 format: [TOOL_CALLS], then a JSON list of {"name": …, "arguments": …}.

Calls are told to the client as they are written: each one's name as soon as it is known, its arguments when they are
whole. A call that the client demands is demanded of the model by a grammar.
"""

from __future__ import annotations

import json
import secrets
import string
from collections.abc import Mapping, Sequence
from typing import Any

MARK = "[TOOL_CALLS]"
_ID = string.ascii_letters + string.digits


def call_id() -> str:
    """Nine letters and digits, as Mistral's format wants them."""
    return "".join(secrets.choice(_ID) for _ in range(9))


def calls_schema(functions: Sequence[Mapping[str, Any]], parallel: bool) -> dict[str, Any]:
    """The JSON schema of a list of calls to these functions, at least one."""
    calls = [
        {
            "type": "object",
            "properties": {"name": {"const": function["name"]}, "arguments": function["parameters"]},
            "required": ["name", "arguments"],
            "additionalProperties": False,
        }
        for function in functions
    ]
    most = {} if parallel else {"maxItems": 1}
    return {"type": "array", "items": {"anyOf": calls}, "minItems": 1, **most}


class CallReader:
    """Text after [TOOL_CALLS], piece by piece → calls as OpenAI has them."""

    def __init__(self) -> None:
        self._text = ""
        self._at = 0  # what is before has been read
        self.count = 0

    def add(self, text: str) -> list[dict[str, Any]]:
        """The calls that are whole now."""
        self._text += text
        decoder = json.JSONDecoder()
        found: list[dict[str, Any]] = []
        while True:
            start = self._text.find("{", self._at)
            if start < 0:
                return found
            try:
                call, self._at = decoder.raw_decode(self._text, start)
            except (ValueError, RecursionError):  # not whole yet
                return found
            if isinstance(call, dict) and isinstance(call.get("name"), str):
                arguments = json.dumps(call.get("arguments", {}), ensure_ascii=False)
                function = {"name": call["name"], "arguments": arguments}
                found.append({"index": self.count, "id": call_id(), "type": "function", "function": function})
                self.count += 1

    @property
    def rest(self) -> str:
        """What is no call, if there was none at all: it is shown as it is."""
        return "" if self.count else self._text
