"""Tool calls as Mistral's models write them, behind [TOOL_CALLS].

Up to v7 that is a JSON list of {"name": …, "arguments": …}. From v11 on it is the name, perhaps
[CALL_ID] and an id, [ARGS] and the arguments; each call has a [TOOL_CALLS] of its own.

A client is told of calls while they are written: of a call's name as soon as it is known, of its
arguments letter by letter. A call that the client demands is enforced by a grammar; any other may
be malformed. What was told of it stays told, and if nothing could be told the text is an answer
like any other.
"""

from __future__ import annotations

import re
import secrets
import string
from typing import Any

from m7mlx.tools.scanner import CallScanner, ObjectScanner

MARK = "[TOOL_CALLS]"
_ID = string.ascii_letters + string.digits
_WHOLE_ID = re.compile("[A-Za-z0-9]{9}")


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

    def mark(self, name: str) -> list[dict[str, Any]]:
        """The deltas that a control token makes: none, in a list."""
        return []

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

    def _add_name(self, name: str, given_id: str = "") -> None:
        own_id = given_id if _WHOLE_ID.fullmatch(given_id) else call_id()
        call = {"id": own_id, "type": "function", "function": {"name": name, "arguments": ""}}
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


class NamedCallReader(CallReader):
    """The same for calls from v11 on, whose parts begin at control tokens."""

    def __init__(self) -> None:
        super().__init__()
        self._where = "name"  # name, id, arguments, nowhere
        self._parts = {"name": "", "id": ""}
        self._object = ObjectScanner()

    def add(self, text: str) -> list[dict[str, Any]]:
        if not self._heads:
            self._text.append(text)
        self._told = []
        if self._where in self._parts:
            self._parts[self._where] += text
        elif self._where == "arguments" and (arguments := self._object.see(text)):
            self._add_arguments(arguments)
        return self._told

    def mark(self, name: str) -> list[dict[str, Any]]:
        self._told = []
        if name == MARK:
            self._where, self._parts, self._object = "name", {"name": "", "id": ""}, ObjectScanner()
        elif name == "[CALL_ID]" and self._where == "name":
            self._where = "id"
        elif name == "[ARGS]" and self._where in self._parts:
            called = self._parts["name"].strip()
            self._where = "arguments" if called else "nowhere"
            if called:
                self._add_name(called, self._parts["id"].strip())
        return self._told

    @property
    def is_open(self) -> bool:
        return not self._object.is_whole

    @property
    def lead(self) -> str:
        return ""
