"""A body → the engine's requests, and its pieces → what OpenAI's clients read."""

from __future__ import annotations

import json
import secrets
import time
from collections.abc import AsyncGenerator, Iterator, Sequence
from contextlib import aclosing
from dataclasses import replace
from typing import Any, ClassVar

from m7mlx import Request, Sampling, Stats
from m7mlx_serve.answering import Answerer
from m7mlx_serve.endpoint import ReadRequest
from m7mlx_serve.errors import ApiError
from m7mlx_serve.openai.choices import Choice, write
from m7mlx_serve.openai.fields import Generation
from m7mlx_serve.tool_calls import MARK

_TEMPERATURE = 0.7  # OpenAI's default is 1, which is too wild for models of this size


class OpenAIAnswers:
    """The `n` answers to one request."""

    stream_type: ClassVar[str] = "text/event-stream"

    def __init__(self, answerer: Answerer, read: ReadRequest) -> None:
        assert isinstance(read.body, Generation)
        self._answerer, self._body, self._ids = answerer, read.body, read.ids
        self._id = self._body.shape.id_prefix + secrets.token_hex(12)
        self._created = int(time.time())
        tool_use = self._body.tool_use
        self._choices = [
            Choice(
                index,
                answerer.tokenizer,
                self._body.shape,
                mark=None if tool_use == "none" else answerer.tokenizer.control_id(MARK),
                calling=tool_use == "required",
                streamed=self._body.stream,
            )
            for index in range(self._body.n)
        ]

    async def whole(self) -> Iterator[str]:
        """The JSON of all answers, in pieces."""
        costs = []
        async with aclosing(self._answerer.pieces(self._requests())) as pieces:
            async for index, piece in pieces:
                self._choices[index].feed(piece)
                if piece.stats:
                    costs.append(piece.stats)
        choices = [choice.whole() for choice in self._choices]
        return write(self._envelope(self._body.shape.whole_object, choices) | {"usage": _usage(costs)})

    async def stream(self) -> AsyncGenerator[str, None]:
        """Server-sent events: chunks, the usage if it is asked for, and an end."""
        costs: list[Stats] = []
        begun = False
        try:
            async with aclosing(self._answerer.pieces(self._requests())) as pieces:
                async for index, piece in pieces:
                    if not begun:
                        for choice in self._choices:
                            if opening := choice.opening():
                                yield self._event([opening])
                    begun = True
                    if piece.stats:
                        costs.append(piece.stats)
                    for chunk in self._choices[index].feed(piece):
                        yield self._event([chunk])
        except ApiError as error:
            if not begun:
                raise
            yield f"data: {json.dumps(error.body())}\n\n"
            return
        if self._body.stream_options and self._body.stream_options.include_usage:
            yield self._event([], usage=_usage(costs))
        yield "data: [DONE]\n\n"

    def _requests(self) -> list[Request]:
        """What the engine is asked for: one request for each answer."""
        body = self._body
        calls = body.demanded_calls if self._answerer.tokenizer.names_calls else None
        request = Request(
            self._ids,
            max_tokens=self._answerer.token_limit(body.token_limit),
            stop=[body.stop] if isinstance(body.stop, str) else body.stop or [],
            at_start=body.starts_message,
            logit_bias={int(token): value for token, value in (body.logit_bias or {}).items()},
            logprobs=body.logprob_count,
            schema=body.answer_schema if calls is None else None,
            calls=calls,
        )
        return [replace(request, sampling=_sampling(body, index)) for index in range(body.n)]

    def _envelope(self, kind: str, choices: Sequence[dict[str, Any]]) -> dict[str, Any]:
        return {
            "id": self._id,
            "object": kind,
            "created": self._created,
            "model": self._body.model,
            "choices": list(choices),
        }

    def _event(self, choices: Sequence[dict[str, Any]], **more: Any) -> str:
        chunk = self._envelope(self._body.shape.chunk_object, choices) | more
        return f"data: {json.dumps(chunk, ensure_ascii=False)}\n\n"


def _sampling(body: Generation, index: int) -> Sampling:
    """How the tokens of answer `index` are chosen.

    With a seed each answer differs from the others, and is the same every time.
    """
    return Sampling(
        temperature=_TEMPERATURE if body.temperature is None else body.temperature,
        top_p=1.0 if body.top_p is None else body.top_p,
        top_k=body.top_k or 0,
        min_p=body.min_p or 0.0,
        repetition_penalty=body.repetition_penalty or 1.0,
        seed=None if body.seed is None else body.seed + index,
    )


def _usage(costs: Sequence[Stats]) -> dict[str, Any]:
    """The tokens of the prompt, counted once, and of all answers.

    How much of the prompt was held already is not told: it would tell a client how other clients'
    conversations begin.
    """
    prompt = max((cost.prompt_tokens for cost in costs), default=0)
    generated = sum(cost.generated_tokens for cost in costs)
    return {
        "prompt_tokens": prompt,
        "completion_tokens": generated,
        "total_tokens": prompt + generated,
        "prompt_tokens_details": {"cached_tokens": 0},
    }
