"""Requests → the engine's, and its pieces → what OpenAI's clients read, whole or as server-sent events."""

from __future__ import annotations

import json
import secrets
import time
from collections.abc import AsyncGenerator, Callable, Mapping, Sequence
from contextlib import aclosing
from dataclasses import replace
from typing import Any, Literal

from m7mlx import Piece, Request, Sampling, Stats
from m7mlx.errors import BusyError, InputError
from m7mlx.tokens.tokenizer import Tokenizer
from m7mlx_serve.choices import Choice
from m7mlx_serve.engine import LateError
from m7mlx_serve.errors import ApiError, report
from m7mlx_serve.reading import Asked, demanded, refusal
from m7mlx_serve.schemas import ChatRequest, Generation
from m7mlx_serve.tool_calls import MARK
from m7mlx_serve.tool_schema import calls_schema

Ask = Callable[[Sequence[Request], float], AsyncGenerator[tuple[int, Piece], None]]
_RETRY_SECONDS = 5
_SAMPLED = 0.7  # OpenAI's default is 1, which is too wild for models of this size


class Answers:
    """The answers to one request: `n` of them."""

    def __init__(self, tokenizer: Tokenizer, ask: Ask, asked: Asked, most: int | None, seconds: float) -> None:
        """`ask` is the engine's; `most` tokens and `seconds` bound each answer."""
        self._tokenizer, self._ask, self._asked, self._most = tokenizer, ask, asked, most
        self._body, self._seconds = asked.body, seconds
        self._is_chat = isinstance(asked.body, ChatRequest)
        self._id = ("chatcmpl-" if self._is_chat else "cmpl-") + secrets.token_hex(12)
        self._created = int(time.time())

    async def whole(self) -> dict[str, Any]:
        """One object with all answers, for `choices.written`."""
        choices, costs = [self._choice(i) for i in range(self._body.n)], []
        async with aclosing(self._pieces()) as pieces:
            async for index, piece in pieces:
                choices[index].feed(piece)
                if piece.stats:
                    costs.append(piece.stats)
        return self._envelope([choice.whole() for choice in choices], "") | {"usage": _usage(costs)}

    async def stream(self) -> AsyncGenerator[str, None]:
        """Server-sent events. What fails before the first token raises; after it, it is an event of its own."""
        choices = [self._choice(i) for i in range(self._body.n)]
        costs: list[Stats] = []
        begun = False
        try:
            async with aclosing(self._pieces()) as pieces:
                async for index, piece in pieces:
                    if not begun and self._is_chat:
                        for choice in choices:
                            yield self._sse(choice.role())
                    begun = True
                    if piece.stats:
                        costs.append(piece.stats)
                    for chunk in choices[index].feed(piece):
                        yield self._sse(chunk)
        except ApiError as error:
            if not begun:
                raise
            yield f"data: {json.dumps(error.body())}\n\n"
            return
        if self._body.stream_options and self._body.stream_options.include_usage:
            yield f"data: {json.dumps(self._envelope([], '.chunk') | {'usage': _usage(costs)})}\n\n"
        yield "data: [DONE]\n\n"

    async def _pieces(self) -> AsyncGenerator[tuple[int, Piece], None]:
        """(number of the answer, piece) of all answers as they come. Raises ApiError for what fails: then all end."""
        try:
            async with aclosing(self._ask(_requests(self._asked, self._most), self._seconds)) as pieces:
                async for index, piece in pieces:
                    if piece.finish_reason in ("failed", "cancelled"):
                        raise _error(piece)
                    yield index, piece
        except BusyError as error:
            raise ApiError(429, str(error), "rate_limit_exceeded", {"Retry-After": str(_RETRY_SECONDS)}) from None
        except LateError as error:
            raise ApiError(504, str(error)) from None
        except InputError as error:
            raise ApiError(400, str(error)) from None

    # --- the client's side ------------------------------------------------------------------------------

    def _choice(self, index: int) -> Choice:
        mark, forced = None, False
        tokenizer = self._tokenizer
        if isinstance(self._body, ChatRequest) and self._body.tools and self._body.tool_choice != "none":
            mark, forced = tokenizer.control_id(MARK), demanded(self._body) is not None
        return Choice(index, tokenizer, self._is_chat, mark, forced, self._body.stream)

    def _envelope(self, choices: Sequence[dict[str, Any]], suffix: Literal["", ".chunk"]) -> dict[str, Any]:
        kind = f"chat.completion{suffix}" if self._is_chat else "text_completion"
        return {
            "id": self._id,
            "object": kind,
            "created": self._created,
            "model": self._body.model,
            "choices": list(choices),
        }

    def _sse(self, choice: dict[str, Any]) -> str:
        return f"data: {json.dumps(self._envelope([choice], '.chunk'), ensure_ascii=False)}\n\n"


def _requests(asked: Asked, most: int | None) -> list[Request]:
    """What the engine is asked for."""
    schema: Mapping[str, Any] | None = None
    body = asked.body
    if isinstance(body, ChatRequest):
        if (tools := demanded(body)) is not None:
            functions = [tool.function.model_dump() for tool in tools]
            schema = calls_schema(functions, body.parallel_tool_calls is not False)
        elif body.response_format and body.response_format.type != "text":
            wanted_schema = body.response_format.json_schema
            schema = wanted_schema.schema_ if wanted_schema else {"type": "object"}
        wanted, logprobs = (
            body.max_completion_tokens or body.max_tokens,
            (body.top_logprobs or 0) if body.logprobs else None,
        )
    else:
        wanted, logprobs = body.max_tokens or 16, body.logprobs  # 16 is OpenAI's default
    limits = [n for n in (wanted, most) if n is not None]
    request = Request(
        asked.ids,
        max_tokens=min(limits, default=None),
        stop=[body.stop] if isinstance(body.stop, str) else body.stop or [],
        at_start=isinstance(body, ChatRequest) and not body.is_continued,
        logit_bias={int(token): value for token, value in (body.logit_bias or {}).items()},
        logprobs=logprobs,
        schema=schema,
    )
    return [replace(request, sampling=_sampling(body, i)) for i in range(body.n)]


def _sampling(body: Generation, index: int) -> Sampling:
    """Of the `index`-th answer: a seed gives each of them another, the same every time."""
    return Sampling(
        temperature=_SAMPLED if body.temperature is None else body.temperature,
        top_p=1.0 if body.top_p is None else body.top_p,
        top_k=body.top_k or 0,
        min_p=body.min_p or 0.0,
        repetition_penalty=body.repetition_penalty or 1.0,
        seed=None if body.seed is None else body.seed + index,
    )


def _usage(costs: Sequence[Stats]) -> dict[str, Any]:
    """The prompt is counted once, however many answers it gets.

    How much of it was held already is not told: it would tell a client how another's conversation begins.
    """
    prompt = max((cost.prompt_tokens for cost in costs), default=0)
    generated = sum(cost.generated_tokens for cost in costs)
    return {
        "prompt_tokens": prompt,
        "completion_tokens": generated,
        "total_tokens": prompt + generated,
        "prompt_tokens_details": {"cached_tokens": 0},
    }


def _error(piece: Piece) -> ApiError:
    """Of a request that did not end well. What was not foreseen is not told to strangers."""
    if isinstance(piece.error, InputError):
        return refusal(piece.error)
    if piece.finish_reason == "cancelled":
        return ApiError(503, "the server is shutting down", "shutting_down")
    if isinstance(piece.error, LateError):
        return ApiError(504, str(piece.error))
    if piece.error is not None:
        report(piece.error)
    return ApiError(500, "the request failed on the way")
