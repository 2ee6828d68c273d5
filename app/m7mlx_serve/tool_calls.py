"""Tool calls in Mistral's v3 format: [TOOL_CALLS], then a JSON list of {"name": …, "arguments": …}.

A client is told of calls while they are written: of a call's name as soon as it is known, of its
arguments letter by letter. A call that the client demands is enforced by a grammar; any other may
be malformed. What was told of it stays told, and if nothing could be told the text is an answer
like any other.
"""

from __future__ import annotations

import secrets
import string
from typing import Any

from m7mlx_serve.tool_scanner import CallScanner

MARK = "[TOOL_CALLS]"
_ID = string.ascii_letters + string.digits


def call_id() -> str:
    """Nine letters and digits, as Mistral's format wants them."""
    return "".join(secrets.choice(_ID) for _ in range(9))


class CallReader:
    """Text after [TOOL_CALLS], in pieces → deltas of calls as OpenAI has them.

    However the text is cut, the deltas joined are the same, and they are `calls`.
    """

    def __init__(self) -> None:
        self._heads: list[dict[str, Any]] = []  # of calls, as far as they have been told
        self._arguments: list[list[str]] = []  # of each call, in pieces
        self._text: list[str] = []
        self._scanner = CallScanner()
        self._told: list[dict[str, Any]] = []

    def add(self, text: str) -> list[dict[str, Any]]:
        """The deltas that `text` makes: names, and pieces of arguments."""
        if not self._heads:
            self._text.append(text)
        self._told = []
        for letter in text:
            for kind, value in self._scanner.see(letter):
                self._add_name(value) if kind == "name" else self._add_arguments(value)
        return self._told

    @property
    def has_calls(self) -> bool:
        """Whether a call has been told."""
        return bool(self._heads)

    @property
    def calls(self) -> list[dict[str, Any]]:
        """All calls, as far as they have been told."""
        return [
            {**head, "function": head["function"] | {"arguments": "".join(pieces)}}
            for head, pieces in zip(self._heads, self._arguments, strict=True)
        ]

    @property
    def is_open(self) -> bool:
        """Whether the call that was told last is not complete."""
        return self._scanner.name is not None

    @property
    def lead(self) -> str:
        """The text before the list; "" if it is all space."""
        lead = "".join(self._scanner.lead)
        return lead if lead.strip() else ""

    @property
    def rest(self) -> str:
        """All of the text, if it holds no call; it is shown as it is."""
        return "" if self._heads else "".join(self._text)

    def _add_name(self, name: str) -> None:
        call = {"id": call_id(), "type": "function", "function": {"name": name, "arguments": ""}}
        self._told.append({"index": len(self._heads), **call, "function": {"name": name, "arguments": ""}})
        self._heads.append(call)
        self._arguments.append([])

    def _add_arguments(self, text: str) -> None:
        index = len(self._heads) - 1
        self._arguments[-1].append(text)
        last = self._told[-1] if self._told else None
        if last is not None and last["index"] == index and "id" not in last:
            last["function"]["arguments"] += text
        else:
            self._told.append({"index": index, "function": {"arguments": text}})
