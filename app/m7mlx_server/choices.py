"""One answer as its client reads it: text, tool calls and log probabilities, piece by piece."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from m7mlx.request import Event
from m7mlx.sampling import TokenScores
from m7mlx.tokenizer import Tokenizer
from m7mlx_server.tools import CallReader


class Choice:
    """Events in, deltas out; `whole` is all of it.

    mark     the id after which tool calls are written; None where none may be
    calling  whether they are written from the beginning on
    """

    def __init__(self, index: int, tokenizer: Tokenizer, is_chat: bool, mark: int | None, calling: bool) -> None:
        self.index, self._tokenizer, self._is_chat = index, tokenizer, is_chat
        self._mark, self._calling, self._reader = mark, calling, CallReader()
        self._led = False  # what stood before the calls has been told
        self._texts: list[str] = []
        self._scores: list[dict[str, Any]] = []
        self._offsets: list[int] = []  # characters told before the token of each score
        self.reason: str | None = None

    def feed(self, event: Event) -> list[dict[str, Any]]:
        """The choices of the chunks that an event makes."""
        scores = [
            _scored(self._tokenizer, token, score) for token, score in zip(event.ids, event.scores, strict=False)
        ]
        offsets = [sum(map(len, self._texts))] * len(scores) if scores else []
        self._scores += scores
        self._offsets += offsets
        text, calls = event.text, []
        self._calling = self._calling or (self._mark is not None and self._mark in event.ids)
        if self._calling:
            calls, text = self._reader.add(text), ""
            if calls and not self._led:
                self._led, text = True, self._reader.lead
            if event.reason is not None and not self._reader.calls:
                text = self._reader.rest
        self._texts.append(text)
        found = []
        if text or scores:
            found.append(self._chunk({"content": text} if text else {}, scores, offsets=offsets))
        found += [self._chunk({"tool_calls": [call]}, []) for call in calls]
        if event.reason is not None:
            called = event.reason == "stop" and self._reader.calls and not self._reader.is_open
            self.reason = "tool_calls" if called else event.reason
            found.append(self._chunk({}, [], self.reason))
        return found

    def role(self) -> dict[str, Any]:
        """The first chunk."""
        return self._chunk({"role": "assistant", "content": ""}, [])

    def whole(self) -> dict[str, Any]:
        text = "".join(self._texts)
        scores = self._logprobs(self._scores, self._offsets)
        if not self._is_chat:
            return {"index": self.index, "text": text, "logprobs": scores, "finish_reason": self.reason}
        message: dict[str, Any] = {"role": "assistant", "content": text, "refusal": None}
        if self._reader.calls:
            message |= {"content": text or None, "tool_calls": self._reader.calls}
        return {"index": self.index, "message": message, "logprobs": scores, "finish_reason": self.reason}

    def _chunk(
        self,
        delta: dict[str, Any],
        scores: Sequence[dict[str, Any]],
        reason: str | None = None,
        offsets: Sequence[int] = (),
    ) -> dict[str, Any]:
        said: dict[str, Any] = {"delta": delta} if self._is_chat else {"text": delta.get("content", "")}
        return {"index": self.index, **said, "logprobs": self._logprobs(scores, offsets), "finish_reason": reason}

    def _logprobs(self, scores: Sequence[dict[str, Any]], offsets: Sequence[int]) -> dict[str, Any] | None:
        if not scores:
            return None
        if self._is_chat:
            return {"content": list(scores), "refusal": None}
        return {
            "tokens": [score["token"] for score in scores],
            "token_logprobs": [score["logprob"] for score in scores],
            "top_logprobs": [{top["token"]: top["logprob"] for top in score["top_logprobs"]} for score in scores],
            "text_offset": list(offsets),
        }


def _scored(tokenizer: Tokenizer, token: int, scores: TokenScores) -> dict[str, Any]:
    top = [_token(tokenizer, other, logprob) for other, logprob in scores.best]
    return _token(tokenizer, token, scores.chosen) | {"top_logprobs": top}


def _token(tokenizer: Tokenizer, token: int, logprob: float) -> dict[str, Any]:
    data = tokenizer.token_bytes(token)
    return {"token": data.decode("utf-8", "replace"), "logprob": max(logprob, -9999.0), "bytes": list(data)}
