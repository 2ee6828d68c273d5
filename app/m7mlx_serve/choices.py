"""One answer as its client reads it: text, tool calls and log probabilities, piece by piece.

What is told piece by piece is not kept. What is told at the end is kept as JSON: of a long answer, objects would take
ten times the memory, and writing all of them at once would hold up everybody.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from typing import Any

from m7mlx import Piece, TokenLogprobs
from m7mlx.tokens.tokenizer import Tokenizer
from m7mlx_serve.tool_calls import CallReader

_AT_ONCE = 16  # tokens whose scores are sent in one piece
_ENDS: dict[bool, dict[str, Any]] = {True: {"refusal": None}, False: {}}  # of scores, in a chat and in a text


class Choice:
    """Pieces in, deltas out; `whole` is all of it, where it was not streamed.

    mark     the id after which tool calls are written; None where none may be
    calling  whether they are written from the beginning on
    """

    def __init__(
        self, index: int, tokenizer: Tokenizer, is_chat: bool, mark: int | None, calling: bool, streamed: bool
    ) -> None:
        self.index, self._tokenizer, self._is_chat, self._streamed = index, tokenizer, is_chat, streamed
        self._mark, self._calling, self._reader = mark, calling, CallReader()
        self._led = False  # what stood before the calls has been told
        self._told = 0  # characters
        self._texts: list[str] = []
        self._logprobs = _Logprobs(is_chat)
        self.reason: str | None = None

    def feed(self, piece: Piece) -> list[dict[str, Any]]:
        """The choices of the chunks that a piece makes."""
        scored = [_scored(self._tokenizer, one) for one in piece.logprobs]
        offset = self._told
        text, calls = piece.text, []
        self._calling = self._calling or (self._mark is not None and self._mark in piece.ids)
        if self._calling:
            calls, text = self._reader.add(text), ""
            if calls and not self._led:
                self._led, text = True, self._reader.lead
            if piece.finish_reason is not None and not self._reader.has_calls:
                text = self._reader.rest
        self._told += len(text)
        if piece.finish_reason is not None:
            called = piece.finish_reason == "stop" and self._reader.has_calls and not self._reader.is_open
            self.reason = "tool_calls" if called else piece.finish_reason
        if not self._streamed:
            self._texts.append(text)
            self._logprobs.add(scored, offset)
            return []
        found = []
        if text or scored:
            found.append(self._chunk({"content": text} if text else {}, scored, offset))
        found += [self._chunk({"tool_calls": [call]}) for call in calls]
        if piece.finish_reason is not None:
            found.append(self._chunk({}, reason=self.reason))
        return found

    def role(self) -> dict[str, Any]:
        """The first chunk."""
        return self._chunk({"role": "assistant", "content": ""})

    def whole(self) -> dict[str, Any]:
        """All of it; `written` knows what its `logprobs` are."""
        text = "".join(self._texts)
        said: dict[str, Any] = {"text": text}
        if self._is_chat:
            message: dict[str, Any] = {"role": "assistant", "content": text, "refusal": None}
            if self._reader.has_calls:
                message |= {"content": text or None, "tool_calls": self._reader.calls}
            said = {"message": message}
        return {"index": self.index, **said, "finish_reason": self.reason, "logprobs": self._logprobs}

    def _chunk(
        self, delta: dict[str, Any], scored: Sequence[dict[str, Any]] = (), offset: int = 0, reason: str | None = None
    ) -> dict[str, Any]:
        said: dict[str, Any] = {"delta": delta} if self._is_chat else {"text": delta.get("content", "")}
        scores = _fields(self._is_chat, scored, offset) | _ENDS[self._is_chat] if scored else None
        return {"index": self.index, **said, "logprobs": scores, "finish_reason": reason}


class _Logprobs:
    """Log probabilities of the tokens of an answer, as JSON."""

    def __init__(self, is_chat: bool) -> None:
        self._is_chat = is_chat
        self._written: dict[str, list[str]] = {}

    def add(self, scored: Sequence[dict[str, Any]], offset: int) -> None:
        """More tokens, all of them after `offset` characters."""
        for field, values in _fields(self._is_chat, scored, offset).items() if scored else ():
            self._written.setdefault(field, []).extend(map(_json, values))

    def pieces(self) -> Iterator[str]:
        if not self._written:
            yield "null"
            return
        for n, (field, written) in enumerate(self._written.items()):
            yield f'{", " if n else "{"}"{field}": ['
            for start in range(0, len(written), _AT_ONCE):
                yield (", " if start else "") + ", ".join(written[start : start + _AT_ONCE])
            yield "]"
        yield "".join(f', "{field}": {_json(value)}' for field, value in _ENDS[self._is_chat].items()) + "}"


def written(answer: dict[str, Any]) -> Iterator[str]:
    """The JSON of an object with whole choices, in pieces, none of which takes long to write."""
    yield _json({field: value for field, value in answer.items() if field != "choices"})[:-1] + ', "choices": ['
    for n, choice in enumerate(answer["choices"]):
        told = {field: value for field, value in choice.items() if field != "logprobs"}
        yield f'{", " if n else ""}{_json(told)[:-1]}, "logprobs": '
        yield from choice["logprobs"].pieces()
        yield "}"
    yield "]}"


def _fields(is_chat: bool, scored: Sequence[dict[str, Any]], offset: int) -> dict[str, list[Any]]:
    """Log probabilities in either of OpenAI's forms."""
    if is_chat:
        return {"content": list(scored)}
    return {
        "tokens": [score["token"] for score in scored],
        "token_logprobs": [score["logprob"] for score in scored],
        "top_logprobs": [{top["token"]: top["logprob"] for top in score["top_logprobs"]} for score in scored],
        "text_offset": [offset] * len(scored),
    }


def _json(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False)


def _scored(tokenizer: Tokenizer, one: TokenLogprobs) -> dict[str, Any]:
    top = [_token(tokenizer, other, logprob) for other, logprob in one.top]
    return _token(tokenizer, one.id, one.logprob) | {"top_logprobs": top}


def _token(tokenizer: Tokenizer, token: int, logprob: float) -> dict[str, Any]:
    data = tokenizer.token_bytes(token)
    return {"token": data.decode("utf-8", "replace"), "logprob": max(logprob, -9999.0), "bytes": list(data)}
