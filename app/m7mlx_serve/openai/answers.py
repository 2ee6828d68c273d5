"""Pieces of answers → what OpenAI's clients read."""

from __future__ import annotations

import json
import secrets
import time
from collections.abc import AsyncGenerator, Iterator, Mapping, Sequence
from contextlib import aclosing
from typing import Any, ClassVar

from m7mlx import Stats
from m7mlx.answer_reader import AnswerReader
from m7mlx_serve.answering import Answerer
from m7mlx_serve.endpoint import ReadRequest
from m7mlx_serve.errors import ApiError
from m7mlx_serve.openai.choices import Choice, write
from m7mlx_serve.openai.fields import Generation


class OpenAIAnswers:
    """The answers to one request: `n` to each of its prompts."""

    stream_type: ClassVar[str] = "text/event-stream"

    def __init__(self, answerer: Answerer, read: ReadRequest) -> None:
        assert isinstance(read.body, Generation)
        self._answerer, self._read, self._body = answerer, read, read.body
        self._id = self._body.shape.id_prefix + secrets.token_hex(12)
        self._created = int(time.time())
        self._choices = [
            Choice(
                index,
                answerer.tokenizer,
                self._body.shape,
                AnswerReader(answerer.tokenizer, read.prompts.tool_use),
                streamed=self._body.stream,
                echoed=read.prompts.ids[index // self._body.n] if self._body.echoes else (),
                is_scored=self._body.logprob_count is not None,
            )
            for index in range(self._body.n * len(read.prompts.ids))
        ]

    async def whole(self) -> Iterator[str]:
        """The JSON of all answers, in pieces."""
        costs: dict[int, Stats] = {}
        async with aclosing(self._answerer.answers(self._read)) as pieces:
            async for index, piece in pieces:
                self._choices[index].feed(piece)
                if piece.stats:
                    costs[index] = piece.stats
        choices = [choice.whole() for choice in self._choices]
        return write(self._envelope(self._body.shape.whole_object, choices) | {"usage": self._usage(costs)})

    async def stream(self) -> AsyncGenerator[str, None]:
        """Server-sent events: chunks, the usage if it is asked for, and an end."""
        costs: dict[int, Stats] = {}
        begun = False
        try:
            async with aclosing(self._answerer.answers(self._read)) as pieces:
                async for index, piece in pieces:
                    if not begun:
                        for choice in self._choices:
                            if opening := choice.opening():
                                yield self._event([opening])
                    begun = True
                    if piece.stats:
                        costs[index] = piece.stats
                    for chunk in self._choices[index].feed(piece):
                        yield self._event([chunk])
        except ApiError as error:
            if not begun:
                raise
            yield f"data: {json.dumps(error.body())}\n\n"
            return
        if self._body.stream_options and self._body.stream_options.include_usage:
            yield self._event([], usage=self._usage(costs))
        yield "data: [DONE]\n\n"

    def _envelope(self, kind: str, choices: Sequence[dict[str, Any]]) -> dict[str, Any]:
        return {
            "id": self._id,
            "object": kind,
            "created": self._created,
            "model": self._answerer.model,
            "choices": list(choices),
        }

    def _event(self, choices: Sequence[dict[str, Any]], **more: Any) -> str:
        chunk = self._envelope(self._body.shape.chunk_object, choices) | more
        return f"data: {json.dumps(chunk, ensure_ascii=False)}\n\n"

    def _usage(self, costs: Mapping[int, Stats]) -> dict[str, Any]:
        """The tokens of each prompt, counted once, and of all answers, whose costs are `costs`."""
        prompt, n = sum(map(len, self._read.prompts.ids)), self._body.n
        generated = sum(cost.generated_tokens for cost in costs.values())
        reused = [
            self._answerer.reused(*(cost for index, cost in costs.items() if index // n == number))
            for number in range(len(self._read.prompts.ids))
        ]
        usage: dict[str, Any] = {
            "prompt_tokens": prompt,
            "completion_tokens": generated,
            "total_tokens": prompt + generated,
            "prompt_tokens_details": {"cached_tokens": sum(reused)},
        }
        if self._read.prompts.prediction:
            usage["completion_tokens_details"] = {
                "accepted_prediction_tokens": sum(cost.accepted_prediction for cost in costs.values()),
                "rejected_prediction_tokens": sum(cost.rejected_prediction for cost in costs.values()),
            }
        return usage
