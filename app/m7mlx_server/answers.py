"""Requests → the engine's, and its events → what OpenAI's clients read, whole or as server-sent events."""

from __future__ import annotations

import asyncio
import json
import secrets
import time
from collections.abc import AsyncGenerator, Callable, Sequence
from contextlib import aclosing
from typing import Any, Literal

from m7mlx.constrain import Constraint, json_constraint
from m7mlx.errors import InputError
from m7mlx.request import Event, Request, Usage
from m7mlx.sampling import Sampling
from m7mlx.tokenizer import Tokenizer
from m7mlx_server.choices import Choice
from m7mlx_server.engine import BusyError, Prepare
from m7mlx_server.guard import ApiError, report
from m7mlx_server.reading import Asked, demanded, refusal
from m7mlx_server.schemas import ChatRequest, Generation
from m7mlx_server.tools import MARK, calls_schema

Ask = Callable[[Prepare], AsyncGenerator[Event, None]]
_RETRY_SECONDS = 5
_SAMPLED = 0.7  # OpenAI's default is 1, which is too wild for models of this size


class Answers:
    """The answers to one request: `n` of them, each a request to the engine."""

    def __init__(self, tokenizer: Tokenizer, ask: Ask, asked: Asked, most: int | None, seconds: float) -> None:
        """`ask` is the engine's; `most` tokens and `seconds` bound each answer."""
        self._tokenizer, self._ask, self._asked, self._most = tokenizer, ask, asked, most
        self._body = asked.body
        self._until = asyncio.get_running_loop().time() + seconds
        self._is_chat = isinstance(asked.body, ChatRequest)
        self._id = ("chatcmpl-" if self._is_chat else "cmpl-") + secrets.token_hex(12)
        self._created = int(time.time())

    async def whole(self) -> dict[str, Any]:
        """One object with all answers, for `choices.written`."""
        try:
            async with asyncio.timeout_at(self._until):
                found = await asyncio.gather(*(self._collect(i) for i in range(self._body.n)))
        except TimeoutError:
            raise ApiError(504, "the answer took too long; ask for fewer tokens, or for a stream") from None
        return self._envelope([choice for choice, _ in found], "") | {"usage": _usage([usage for _, usage in found])}

    async def stream(self) -> AsyncGenerator[str, None]:
        """Server-sent events. What fails before the first token raises; after it, it is an event of its own."""
        events = self._merged()
        choices = [self._choice(i) for i in range(self._body.n)]
        usages: list[Usage] = []
        begun = False
        try:
            async for index, event in events:
                if not begun and self._is_chat:
                    for choice in choices:
                        yield self._sse(choice.role())
                begun = True
                if event.reason in ("failed", "cancelled"):
                    yield f"data: {json.dumps(_error(event).body())}\n\n"
                    return
                if event.usage:
                    usages.append(event.usage)
                for chunk in choices[index].feed(event):
                    yield self._sse(chunk)
            if self._body.stream_options and self._body.stream_options.include_usage:
                yield f"data: {json.dumps(self._envelope([], '.chunk') | {'usage': _usage(usages)})}\n\n"
            yield "data: [DONE]\n\n"
        except TimeoutError:
            yield f"data: {json.dumps(ApiError(504, 'the answer took too long').body())}\n\n"
        finally:
            await events.aclose()

    # --- the engine's side ------------------------------------------------------------------------------

    def _prepare(self, index: int) -> Prepare:
        return lambda tokenizer: _request(self._asked, tokenizer, index, self._most)

    async def _collect(self, index: int) -> tuple[dict[str, Any], Usage]:
        choice = self._choice(index)
        try:
            async with aclosing(self._ask(self._prepare(index))) as events:
                async for event in events:
                    choice.feed(event)
        except BusyError as error:
            raise _busy(error) from None
        if event.reason in ("failed", "cancelled") or event.usage is None:
            raise _error(event)
        return choice.whole(), event.usage

    async def _merged(self) -> AsyncGenerator[tuple[int, Event], None]:
        """The events of all answers as they come. Raises ApiError for what fails before its first token."""
        queue: asyncio.Queue[tuple[int, Event | Exception]] = asyncio.Queue()

        async def pump(index: int) -> None:
            try:
                async with aclosing(self._ask(self._prepare(index))) as events:
                    async for event in events:
                        queue.put_nowait((index, event))
            except BusyError as error:
                queue.put_nowait((index, error))

        tasks = [asyncio.create_task(pump(i)) for i in range(self._body.n)]
        try:
            going, begun = self._body.n, False
            while going:
                async with asyncio.timeout_at(self._until):
                    index, event = await queue.get()
                if isinstance(event, Exception):
                    raise _busy(event)
                if event.reason == "failed" and not begun:
                    raise _error(event)
                begun = True
                going -= event.reason is not None
                yield index, event
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

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


def _request(asked: Asked, tokenizer: Tokenizer, index: int, most: int | None) -> Request:
    """What the engine is asked for the `index`-th answer. Raises InputError for what the model cannot do."""
    constraint: Constraint | None = None
    body = asked.body
    if isinstance(body, ChatRequest):
        if (tools := demanded(body)) is not None:
            functions = [tool.function.model_dump() for tool in tools]
            constraint = json_constraint(tokenizer, calls_schema(functions, body.parallel_tool_calls is not False))
        elif body.response_format and body.response_format.type != "text":
            wanted_schema = body.response_format.json_schema
            constraint = json_constraint(tokenizer, wanted_schema.schema_ if wanted_schema else None)
        wanted, logprobs = (
            body.max_completion_tokens or body.max_tokens,
            (body.top_logprobs or 0) if body.logprobs else None,
        )
    else:
        wanted, logprobs = body.max_tokens or 16, body.logprobs  # 16 is OpenAI's default
    limits = [n for n in (wanted, most) if n is not None]
    return Request(
        asked.ids,
        _sampling(body, index),
        min(limits, default=None),
        [body.stop] if isinstance(body.stop, str) else body.stop or [],
        at_start=isinstance(body, ChatRequest),
        logit_bias={int(token): value for token, value in (body.logit_bias or {}).items()},
        logprobs=logprobs,
        constraint=constraint,
    )


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


def _usage(usages: Sequence[Usage]) -> dict[str, Any]:
    """The prompt is counted once, however many answers it gets.

    How much of it was held already is not told: it would tell a client how another's conversation begins.
    """
    prompt = max((usage.prompt_tokens for usage in usages), default=0)
    generated = sum(usage.generated_tokens for usage in usages)
    return {
        "prompt_tokens": prompt,
        "completion_tokens": generated,
        "total_tokens": prompt + generated,
        "prompt_tokens_details": {"cached_tokens": 0},
    }


def _busy(error: Exception) -> ApiError:
    return ApiError(429, str(error), "rate_limit_exceeded", {"Retry-After": str(_RETRY_SECONDS)})


def _error(event: Event) -> ApiError:
    """Of a request that did not end well. What was not foreseen is not told to strangers."""
    if isinstance(event.error, InputError):
        return refusal(event.error)
    if event.reason == "cancelled":
        return ApiError(503, "the server is shutting down", "shutting_down")
    if event.error is not None:
        report(event.error)
    return ApiError(500, "the request failed on the way")
