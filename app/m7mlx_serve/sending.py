"""Answers on their way to their clients: whole, as events, or vectors, written as they are read."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncGenerator, AsyncIterator, Generator, Iterator
from contextlib import AsyncExitStack
from itertools import islice

from starlette.responses import Response, StreamingResponse
from starlette.types import Receive, Scope, Send

from m7mlx_serve.vector_room import VectorPlace

_AT_ONCE = 16  # vectors that are written at a time


def send_whole(answer: Iterator[str]) -> Response:
    """Return the response that sends an answer, which has been made."""
    pieces = [piece.encode() for piece in answer]

    async def sent() -> AsyncIterator[bytes]:
        for piece in pieces:
            yield piece

    size = {"Content-Length": str(sum(map(len, pieces)))}
    return StreamingResponse(sent(), media_type="application/json", headers=size)


class SentVectors(StreamingResponse):
    """Vectors, each written when its client has read those before; their room is given back."""

    def __init__(self, pieces: Generator[str, None, None], place: VectorPlace) -> None:
        super().__init__(self._written(), media_type="application/json")
        self._pieces, self._place = pieces, place

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        with contextlib.suppress(TimeoutError):  # the connection is closed then, amid the answer
            async with self._place.reading():
                try:
                    await super().__call__(scope, receive, send)
                finally:
                    with contextlib.suppress(ValueError):  # it is just being asked for more
                        self._pieces.close()  # which forgets the vectors

    async def _written(self) -> AsyncIterator[bytes]:
        # On a thread: there may be millions of numbers.
        while some := await asyncio.to_thread(lambda: "".join(islice(self._pieces, _AT_ONCE))):
            yield some.encode()


class Stream(StreamingResponse):
    """The events of answers; what they use is given back however it ends."""

    def __init__(self, first: str, events: AsyncGenerator[str, None], kind: str, using: AsyncExitStack) -> None:
        super().__init__(_joined(first, events), media_type=kind, headers={"Cache-Control": "no-store"})
        self._events, self._using = events, using

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            await self._events.aclose()
            await self._using.aclose()


async def _joined(first: str, rest: AsyncGenerator[str, None]) -> AsyncIterator[str]:
    try:
        yield first
        async for event in rest:
            yield event
    finally:
        await rest.aclose()
