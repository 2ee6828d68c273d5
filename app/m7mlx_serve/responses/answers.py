"""Pieces of an answer → what clients of /v1/responses read."""

from __future__ import annotations

import json
import secrets
import time
from collections.abc import AsyncGenerator, Iterator
from contextlib import aclosing
from typing import Any, ClassVar

from m7mlx import Stats
from m7mlx.answer_reader import AnswerReader
from m7mlx_serve.answering import Answerer
from m7mlx_serve.endpoint import ReadRequest
from m7mlx_serve.errors import ApiError
from m7mlx_serve.responses.create import ResponseRequest
from m7mlx_serve.responses.held import Held, HeldResponses
from m7mlx_serve.responses.output import Output

_Fields = dict[str, Any]


class ResponseAnswers:
    """The answer to one request: items of text, of thoughts and of calls."""

    stream_type: ClassVar[str] = "text/event-stream"

    def __init__(self, held: HeldResponses, answerer: Answerer, read: ReadRequest) -> None:
        """Prepare to answer; what is to be kept of it goes into `held`."""
        assert isinstance(read.body, ResponseRequest)
        self._held, self._answerer, self._read, self._body = held, answerer, read, read.body
        reader = AnswerReader(answerer.tokenizer, read.prompts.tool_use)
        self._output = Output(reader, self._body.called, self._body.seals_thoughts)
        self._id, self._created = f"resp_{secrets.token_hex(16)}", int(time.time())
        self._stats = Stats()
        self._number = 0  # of the next event

    async def whole(self) -> Iterator[str]:
        """The JSON of the response."""
        async with aclosing(self._answerer.answers(self._read)) as pieces:
            async for _, piece in pieces:
                self._stats = piece.stats or self._stats
                for _ in self._output.take(piece):
                    pass
        return iter([self._finished()])

    async def stream(self) -> AsyncGenerator[str, None]:
        """Server-sent events: the response's start, its items as they come, and its end."""
        begun = False
        try:
            async with aclosing(self._answerer.answers(self._read)) as pieces:
                async for _, piece in pieces:
                    if not begun:
                        yield self._event({"type": "response.created", "response": self._response("in_progress")})
                        yield self._event({"type": "response.in_progress", "response": self._response("in_progress")})
                    begun = True
                    self._stats = piece.stats or self._stats
                    for event in self._output.take(piece):
                        yield self._event(event)
        except ApiError as error:
            if not begun:
                raise
            code = "rate_limit_exceeded" if error.status == 429 else "server_error"
            failed = self._response("failed") | {"error": {"code": code, "message": str(error)}}
            yield self._event({"type": "response.failed", "response": failed})
            return
        response = self._finished()
        kind = "response.incomplete" if self._output.is_cut else "response.completed"
        yield self._event({"type": kind, "response": json.loads(response)})

    def _finished(self) -> str:
        """The JSON of the response, which is held if its client wants that."""
        reply = json.dumps(self._response("incomplete" if self._output.is_cut else "completed"), ensure_ascii=False)
        if self._body.store:
            messages = json.loads(self._read.prompts.held) + self._output.messages
            told = json.dumps(messages, ensure_ascii=False).encode()
            self._held.put(self._answerer.space, self._id, Held(reply.encode(), told))
        return reply

    def _event(self, data: _Fields) -> str:
        numbered = data | {"sequence_number": self._number}
        self._number += 1
        return f"event: {data['type']}\ndata: {json.dumps(numbered, ensure_ascii=False)}\n\n"

    def _response(self, status: str) -> _Fields:
        """The response. Instructions, tools and schemas are not told again: nothing keeps them."""
        body, wanted = self._body, self._read.body.wanted()
        is_cut = status == "incomplete"
        return {
            "id": self._id,
            "object": "response",
            "created_at": self._created,
            "completed_at": int(time.time()) if status == "completed" else None,
            "status": status,
            "background": False,
            "error": None,
            "incomplete_details": {"reason": "max_output_tokens"} if is_cut else None,
            "instructions": None,
            "max_output_tokens": wanted.max_tokens,
            "metadata": body.metadata,
            "model": self._answerer.model,
            "output": list(self._output.items),
            "parallel_tool_calls": body.parallel_tool_calls,
            "previous_response_id": body.previous_response_id,
            "reasoning": {"effort": None, "summary": None},
            "store": body.store,
            "temperature": wanted.temperature,
            "text": {"format": {"type": "text"}},
            "tool_choice": "auto",
            "tools": [],
            "top_p": wanted.top_p,
            "truncation": "disabled",
            "usage": None if status in ("in_progress", "failed") else self._usage(),
        }

    def _usage(self) -> _Fields:
        prompt, generated = len(self._read.prompts.ids[0]), self._output.generated
        return {
            "input_tokens": prompt,
            "input_tokens_details": {"cached_tokens": self._answerer.reused(self._stats), "cache_write_tokens": 0},
            "output_tokens": generated,
            "output_tokens_details": {"reasoning_tokens": self._output.thought_tokens},
            "total_tokens": prompt + generated,
        }
