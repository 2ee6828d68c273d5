"""Pieces of an answer → its text, and the calls in it: what every API tells its clients."""

from __future__ import annotations

import json
from typing import Any, NamedTuple

from m7mlx.answer import FinishReason, Piece
from m7mlx.tokens.tokenizer import Tokenizer
from m7mlx.tools.calling import OPEN, MarkedCalls, ToolUse, call_form
from m7mlx.tools.calls import CallReader, NamedCallReader


class Told(NamedTuple):
    """What a piece tells: more text, then more of calls (`CallReader`), and more of thoughts."""

    text: str
    calls: list[dict[str, Any]]
    thought: str


class AnswerReader:
    """Reads one answer.

    reason  how the answer ended: "tool_calls" where it calls and is complete
    """

    def __init__(self, tokenizer: Tokenizer, tool_use: ToolUse) -> None:
        form = call_form(tokenizer) if tool_use != "none" else None
        self._tokenizer = tokenizer
        self._mark = form.mark if isinstance(form, MarkedCalls) else None
        self._tag = None if form is None or self._mark is not None else TagFilter()
        self._is_calling = self._mark is not None and tool_use == "required"
        is_named = self._mark is not None and tokenizer.names_calls
        self._reader = NamedCallReader() if is_named else CallReader()
        self._lead_told = False  # the text before the calls
        self.reason: FinishReason | str | None = None

    def read(self, piece: Piece) -> Told:
        """Take a piece; return what it tells."""
        text, calls = self._read_tagged(piece) if self._tag else self._read_marked(piece)
        if calls and not self._lead_told:
            self._lead_told = True
            text += self._reader.lead
        if piece.finish_reason is not None:
            if self._is_calling and not self._reader.has_calls:
                text += (OPEN if self._tag else "") + self._reader.rest
            called = piece.finish_reason == "stop" and self._reader.has_calls and not self._reader.is_open
            self.reason = "tool_calls" if called else piece.finish_reason
        return Told(text, calls, piece.thought)

    def _read_marked(self, piece: Piece) -> tuple[str, list[dict[str, Any]]]:
        """Read calls that begin at control tokens, which stand behind the text of their piece."""
        text, calls = piece.text, list[dict[str, Any]]()
        if self._is_calling:
            calls, text = list(self._reader.add(text)), ""
        for token in piece.ids if self._mark is not None else ():
            name = self._tokenizer.marks.get(token)
            if self._is_calling and name is not None:
                calls += self._reader.mark(name)
            elif token == self._mark:
                self._is_calling = True
        return text, calls

    def _read_tagged(self, piece: Piece) -> tuple[str, list[dict[str, Any]]]:
        assert self._tag is not None
        text, inner = self._tag.split(piece.text, is_last=piece.finish_reason is not None)
        if inner is None:
            return text, []
        self._is_calling = True
        return text, self._reader.add(inner)

    @property
    def calls(self) -> list[dict[str, Any]]:
        """All calls, as far as they have been told."""
        return self._reader.calls


class TagFilter:
    """Finds where calls begin in a text. The white space before that is part of neither."""

    def __init__(self) -> None:
        self._held, self._has_begun = "", False

    def split(self, text: str, is_last: bool) -> tuple[str, str | None]:
        """Take more text; return what is no call, and what is; None before any call."""
        if self._has_begun:
            return "", text
        self._held += text
        before, mark, inner = self._held.partition(OPEN)
        if mark:
            self._held, self._has_begun = "", True
            return before.rstrip(), inner
        end = len(self._held)
        if not is_last:
            begun = max((n for n in range(1, len(OPEN)) if self._held.endswith(OPEN[:n])), default=0)
            end = len(self._held[: end - begun].rstrip())
        shown, self._held = self._held[:end], self._held[end:]
        return shown, None


def read_arguments(text: str) -> dict[str, Any]:
    """The arguments of a call as an object; text that is none stands in one under its own name."""
    try:
        found = json.loads(text)
    except (RecursionError, ValueError):
        found = None
    return found if isinstance(found, dict) else {"arguments": text}
