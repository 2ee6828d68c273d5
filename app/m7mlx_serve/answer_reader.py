"""Pieces of an answer → its text, and the calls in it: what every API tells its clients."""

from __future__ import annotations

import json
from typing import Any, NamedTuple, Protocol

from m7mlx import Piece
from m7mlx.answer import FinishReason
from m7mlx.tokens.tokenizer import Tokenizer
from m7mlx_serve.calling import OPEN, MarkedCalls, call_form
from m7mlx_serve.endpoint import ToolUse
from m7mlx_serve.tool_calls import CallReader


class Told(NamedTuple):
    """What a piece tells: more text, then more of calls (`CallReader`)."""

    text: str
    calls: list[dict[str, Any]]


class _Splitter(Protocol):
    mark: str  # the text that begins calls, if it is one

    def split(self, piece: Piece) -> tuple[str, str | None]:
        """The text of a piece that is no call, and that which is; None before any call."""


class AnswerReader:
    """Reads one answer.

    reason  how the answer ended: "tool_calls" where it calls and is complete
    """

    def __init__(self, tokenizer: Tokenizer, tool_use: ToolUse) -> None:
        self._splitter: _Splitter | None = None
        if tool_use != "none":
            form = call_form(tokenizer)
            if isinstance(form, MarkedCalls):
                self._splitter = _ControlMark(form.mark, tool_use == "required")
            else:
                self._splitter = _TextMark()
        self._reader = CallReader()
        self._lead_told = False  # the text before the calls
        self.reason: FinishReason | str | None = None

    def read(self, piece: Piece) -> Told:
        """Take a piece; return what it tells."""
        text, inner = (piece.text, None) if self._splitter is None else self._splitter.split(piece)
        calls: list[dict[str, Any]] = []
        if inner is not None:
            calls = self._reader.add(inner)
            if calls and not self._lead_told:
                self._lead_told = True
                text += self._reader.lead
            if piece.finish_reason is not None and not self._reader.has_calls and self._splitter is not None:
                text += self._splitter.mark + self._reader.rest
        if piece.finish_reason is not None:
            called = piece.finish_reason == "stop" and self._reader.has_calls and not self._reader.is_open
            self.reason = "tool_calls" if called else piece.finish_reason
        return Told(text, calls)

    @property
    def calls(self) -> list[dict[str, Any]]:
        """All calls, as far as they have been told."""
        return self._reader.calls


class _ControlMark:
    """Calls begin behind a control token."""

    mark = ""

    def __init__(self, mark: int, has_begun: bool) -> None:
        self._id, self._has_begun = mark, has_begun

    def split(self, piece: Piece) -> tuple[str, str | None]:
        self._has_begun = self._has_begun or self._id in piece.ids
        return ("", piece.text) if self._has_begun else (piece.text, None)


class _TextMark:
    """Calls begin behind a text. The white space before it is part of neither."""

    mark = OPEN

    def __init__(self) -> None:
        self._held, self._has_begun = "", False

    def split(self, piece: Piece) -> tuple[str, str | None]:
        if self._has_begun:
            return "", piece.text
        self._held += piece.text
        before, mark, inner = self._held.partition(OPEN)
        if mark:
            self._held, self._has_begun = "", True
            return before.rstrip(), inner
        end = len(self._held)
        if piece.finish_reason is None:
            begun = max((n for n in range(1, len(OPEN)) if self._held.endswith(OPEN[:n])), default=0)
            end = len(self._held[: end - begun].rstrip())
        text, self._held = self._held[:end], self._held[end:]
        return text, None


def read_arguments(text: str) -> dict[str, Any]:
    """The arguments of a call as an object; text that is none stands in one under its own name."""
    try:
        found = json.loads(text)
    except (RecursionError, ValueError):
        found = None
    return found if isinstance(found, dict) else {"arguments": text}
