"""Pieces of an answer → what Anthropic's clients read."""

from __future__ import annotations

import json
import secrets
from collections.abc import AsyncGenerator, Iterator
from contextlib import aclosing
from typing import Any, ClassVar

from m7mlx import Piece, Stats
from m7mlx.answer_reader import AnswerReader, read_arguments
from m7mlx_serve.answering import Answerer
from m7mlx_serve.anthropic.errors import error_body
from m7mlx_serve.endpoint import ReadRequest
from m7mlx_serve.errors import ApiError

_Fields = dict[str, Any]
_REASONS = {"stop": "end_turn", "length": "max_tokens", "tool_calls": "tool_use"}


class MessageAnswers:
    """The answer to one request: blocks of text and of calls."""

    stream_type: ClassVar[str] = "text/event-stream"

    def __init__(self, answerer: Answerer, read: ReadRequest) -> None:
        self._answerer, self._read = answerer, read
        self._reader = AnswerReader(answerer.tokenizer, read.prompts.tool_use)
        self._id = f"msg_{secrets.token_hex(12)}"
        self._generated, self._stats = 0, Stats()
        self._stop: str | None = None  # the stop text that ended the answer
        self._index, self._kind = -1, ""  # of the stream's last block; "" where none is open

    async def whole(self) -> Iterator[str]:
        """The JSON of the message."""
        texts, thoughts = list[str](), list[str]()
        async with aclosing(self._answerer.answers(self._read)) as pieces:
            async for _, piece in pieces:
                told = self._reader.read(piece)
                texts.append(told.text)
                thoughts.append(told.thought)
                self._count(piece)
        text, calls = "".join(texts), self._reader.calls
        content: list[_Fields] = []
        if thought := "".join(thoughts):
            content.append({"type": "thinking", "thinking": thought, "signature": ""})
        if text or not calls:
            content.append({"type": "text", "text": text})
        for call in calls:
            function = call["function"]
            given = read_arguments(function["arguments"])
            content.append({"type": "tool_use", "id": call["id"], "name": function["name"], "input": given})
        return iter([json.dumps(self._message(content, *self._reason()), ensure_ascii=False)])

    async def stream(self) -> AsyncGenerator[str, None]:
        """Server-sent events: the message's start, its blocks as they come, and its end."""
        begun = False
        try:
            async with aclosing(self._answerer.answers(self._read)) as pieces:
                async for _, piece in pieces:
                    if not begun:
                        yield _event({"type": "message_start", "message": self._message([], None, None)})
                    begun = True
                    self._count(piece)
                    for event in self._events(piece):
                        yield _event(event)
        except ApiError as error:
            if not begun:
                raise
            yield _event(error_body(error))
            return
        reason, stop = self._reason()
        ended = {"stop_reason": reason, "stop_sequence": stop}
        yield _event({"type": "message_delta", "delta": ended, "usage": self._usage()})
        yield _event({"type": "message_stop"})

    def _events(self, piece: Piece) -> Iterator[_Fields]:
        """What a piece adds to the stream's blocks."""
        text, calls, thought = self._reader.read(piece)
        is_last = piece.finish_reason is not None
        if thought:
            if self._kind != "thinking":
                yield from self._begin({"type": "thinking", "thinking": "", "signature": ""})
            yield self._delta({"type": "thinking_delta", "thinking": thought})
        if text or (is_last and self._index < 0 and not calls):  # a message has a block
            if self._kind != "text":
                yield from self._begin({"type": "text", "text": ""})
            if text:
                yield self._delta({"type": "text_delta", "text": text})
        for call in calls:
            function = call["function"]
            if "id" in call:
                block = {"type": "tool_use", "id": call["id"], "name": function["name"], "input": {}}
                yield from self._begin(block)
            if function["arguments"]:
                yield self._delta({"type": "input_json_delta", "partial_json": function["arguments"]})
        if is_last:
            yield from self._end()

    def _begin(self, block: _Fields) -> Iterator[_Fields]:
        yield from self._end()
        self._index, self._kind = self._index + 1, block["type"]
        yield {"type": "content_block_start", "index": self._index, "content_block": block}

    def _delta(self, delta: _Fields) -> _Fields:
        return {"type": "content_block_delta", "index": self._index, "delta": delta}

    def _end(self) -> Iterator[_Fields]:
        if self._kind:
            self._kind = ""
            yield {"type": "content_block_stop", "index": self._index}

    def _count(self, piece: Piece) -> None:
        self._generated += len(piece.ids)
        self._stats = piece.stats or self._stats
        self._stop = piece.stop

    def _reason(self) -> tuple[str, str | None]:
        """Why the answer ended, and by which stop text."""
        if self._stop is not None:
            return "stop_sequence", self._stop
        return _REASONS[str(self._reader.reason)], None

    def _message(self, content: list[_Fields], reason: str | None, stop: str | None) -> _Fields:
        return {
            "id": self._id,
            "type": "message",
            "role": "assistant",
            "model": self._answerer.model,
            "content": content,
            "stop_reason": reason,
            "stop_sequence": stop,
            "usage": self._usage(),
        }

    def _usage(self) -> _Fields:
        reused = self._answerer.reused(self._stats)
        return {
            "input_tokens": len(self._read.prompts.ids[0]) - reused,
            "output_tokens": self._generated,
            "cache_creation_input_tokens": 0,
            "cache_read_input_tokens": reused,
        }


class CountAnswers:
    """The number of a conversation's tokens."""

    stream_type: ClassVar[str] = "text/event-stream"

    def __init__(self, answerer: Answerer, read: ReadRequest) -> None:
        self._count = len(read.prompts.ids[0])

    async def whole(self) -> Iterator[str]:
        """The number, in JSON."""
        return iter([json.dumps({"input_tokens": self._count})])

    async def stream(self) -> AsyncGenerator[str, None]:
        """The same: there is nothing to wait for."""
        for text in await self.whole():
            yield text


def _event(data: _Fields) -> str:
    return f"event: {data['type']}\ndata: {json.dumps(data, ensure_ascii=False)}\n\n"
