"""Requests → the engine's, and its events → what OpenAI's clients read, whole or as server-sent events."""

from __future__ import annotations

import asyncio
import json
import secrets
import time
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from typing import Any, Literal

from m7mlx.errors import InputError
from m7mlx.sampling import Sampling
from m7mlx.scheduler import Event, Request, Usage
from m7mlx.tokenizer import Tokenizer
from m7mlx_server.engine import BusyError, Engine, Prepare
from m7mlx_server.guard import ApiError
from m7mlx_server.schemas import ChatRequest, CompletionRequest, Generation

RETRY_SECONDS = 5
_SAMPLED = 0.7  # OpenAI's default is 1, which is too wild for models of this size


class Answers:
    """The answers to one request: `n` of them, each a request to the engine."""

    def __init__(
        self, engine: Engine, body: ChatRequest | CompletionRequest, most: int | None, seconds: float
    ) -> None:
        """`most` tokens and `seconds` bound each answer."""
        self._engine, self._body, self._most = engine, body, most
        self._until = asyncio.get_running_loop().time() + seconds
        self._is_chat = isinstance(body, ChatRequest)
        self._id = ("chatcmpl-" if self._is_chat else "cmpl-") + secrets.token_hex(12)
        self._created = int(time.time())

    async def whole(self) -> dict[str, Any]:
        """One object with all answers."""
        try:
            async with asyncio.timeout_at(self._until):
                found = await asyncio.gather(*(self._collect(i) for i in range(self._body.n)))
        except TimeoutError:
            raise ApiError(504, "the answer took too long; ask for fewer tokens, or for a stream") from None
        choices = [self._choice(i, text, reason) for i, (text, reason, _) in enumerate(found)]
        return self._envelope(choices, "") | {"usage": _usage([usage for *_, usage in found])}

    async def stream(self) -> AsyncGenerator[str, None]:
        """Server-sent events. What fails before the first token raises; after it, it is an event of its own."""
        events = self._merged()
        usages: list[Usage] = []
        try:
            begun = False
            async for index, event in events:
                if not begun and self._is_chat:
                    for i in range(self._body.n):
                        yield self._sse([self._delta(i, {"role": "assistant", "content": ""}, None)])
                begun = True
                if event.reason == "failed" or event.reason == "cancelled":
                    yield f"data: {json.dumps(_error(event).body())}\n\n"
                    return
                if event.usage:
                    usages.append(event.usage)
                if event.text or event.reason:
                    delta = {"content": event.text} if event.text else {}
                    yield self._sse([self._delta(index, delta, event.reason)])
            if self._body.stream_options and self._body.stream_options.include_usage:
                yield f"data: {json.dumps(self._envelope([], '.chunk') | {'usage': _usage(usages)})}\n\n"
            yield "data: [DONE]\n\n"
        except TimeoutError:
            yield f"data: {json.dumps(ApiError(504, 'the answer took too long').body())}\n\n"
        finally:
            await events.aclose()

    # --- the engine's side ------------------------------------------------------------------------------

    def _prepare(self, index: int) -> Prepare:
        body, most = self._body, self._most

        def prepare(tokenizer: Tokenizer) -> Request:
            if isinstance(body, ChatRequest):
                ids = tokenizer.chat.encode([message.plain() for message in body.messages])
                wanted = body.max_completion_tokens or body.max_tokens
            else:
                text = body.prompt
                ids = tokenizer.encode(text, add_bos=tokenizer.add_bos) if isinstance(text, str) else list(text)
                wanted = body.max_tokens or 16  # OpenAI's default
            limits = [n for n in (wanted, most) if n is not None]
            stop = [body.stop] if isinstance(body.stop, str) else body.stop or []
            return Request(
                ids, _sampling(body, index), min(limits, default=None), stop, at_start=isinstance(body, ChatRequest)
            )

        return prepare

    async def _collect(self, index: int) -> tuple[str, str, Usage]:
        texts: list[str] = []
        async with aclosing(self._engine.ask(self._prepare(index))) as events:
            async for event in events:
                texts.append(event.text)
        if event.reason in ("failed", "cancelled") or event.usage is None or event.reason is None:
            raise _error(event)
        return "".join(texts), event.reason, event.usage

    async def _merged(self) -> AsyncGenerator[tuple[int, Event], None]:
        """The events of all answers as they come. Raises ApiError for what fails before its first token."""
        queue: asyncio.Queue[tuple[int, Event | Exception]] = asyncio.Queue()

        async def pump(index: int) -> None:
            try:
                async with aclosing(self._engine.ask(self._prepare(index))) as events:
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

    def _envelope(self, choices: Sequence[dict[str, Any]], suffix: Literal["", ".chunk"]) -> dict[str, Any]:
        kind = f"chat.completion{suffix}" if self._is_chat else "text_completion"
        return {
            "id": self._id,
            "object": kind,
            "created": self._created,
            "model": self._body.model,
            "choices": list(choices),
        }

    def _choice(self, index: int, text: str, reason: str) -> dict[str, Any]:
        said = (
            {"message": {"role": "assistant", "content": text, "refusal": None}} if self._is_chat else {"text": text}
        )
        return {"index": index, **said, "logprobs": None, "finish_reason": reason}

    def _delta(self, index: int, delta: dict[str, str], reason: str | None) -> dict[str, Any]:
        said: dict[str, Any] = {"delta": delta} if self._is_chat else {"text": delta.get("content", "")}
        return {"index": index, **said, "logprobs": None, "finish_reason": reason}

    def _sse(self, choices: Sequence[dict[str, Any]]) -> str:
        return f"data: {json.dumps(self._envelope(choices, '.chunk'), ensure_ascii=False)}\n\n"


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
    """The prompt is counted once, however many answers it gets."""
    prompt = max((usage.prompt_tokens for usage in usages), default=0)
    generated = sum(usage.generated_tokens for usage in usages)
    cached = max((usage.reused_tokens for usage in usages), default=0)
    return {
        "prompt_tokens": prompt,
        "completion_tokens": generated,
        "total_tokens": prompt + generated,
        "prompt_tokens_details": {"cached_tokens": cached},
    }


def _busy(error: Exception) -> ApiError:
    return ApiError(429, str(error), "rate_limit_exceeded", {"Retry-After": str(RETRY_SECONDS)})


def _error(event: Event) -> ApiError:
    """Of a request that did not end well. What was not foreseen is not told to strangers."""
    if isinstance(event.error, InputError):
        code = "context_length_exceeded" if type(event.error).__name__ == "PromptTooLongError" else None
        return ApiError(400, str(event.error), code)
    if event.reason == "cancelled":
        return ApiError(503, "the server is shutting down", "shutting_down")
    return ApiError(500, "the request failed on the way")
