"""Bodies of requests as they arrive, and the memory that all of them share."""

from __future__ import annotations

import asyncio
import contextlib
import math
import zlib

from starlette.types import Receive

from m7mlx_serve.errors import ApiError

MAX_BODY, SMALL_BODY = 8 << 20, 64 << 10  # bytes
MAX_BODIES = 64 << 20  # bytes of all bodies that are larger than small
BODY_SECONDS = 30.0  # that a body may take to arrive
ARRIVAL_SECONDS = 2.0  # that a large body may take to arrive while others wait for room
ROOM_SECONDS = 10.0  # that a large body waits for room
SCOPE_KEY = "m7mlx.body"  # where a request's scope has its body, for whoever has read it to drop


class BodyRoom:
    """The memory that large bodies share. Each keeps its place until it is dropped (`Body.drop`).

    Small bodies always find room. A large one waits in line until there is room for all of it. In
    the meantime the body that has been arriving for longest gives way, if it has had its time.
    """

    def __init__(self) -> None:
        self._sizes: dict[Body, int] = {}  # of large bodies, in bytes
        self._line = asyncio.Lock()
        self._freed = asyncio.Event()

    async def reserve(self, body: Body, size: int) -> None:
        """Wait until `body` may have `size` bytes. Raises ApiError if that takes too long."""
        if size <= SMALL_BODY:
            return
        try:
            async with asyncio.timeout(ROOM_SECONDS), self._line:
                while sum(self._sizes.values()) + size > MAX_BODIES:
                    late = asyncio.get_running_loop().time() - ARRIVAL_SECONDS
                    if slow := next((other for other in self._sizes if other.arriving_since < late), None):
                        slow.give_way()
                    self._freed.clear()
                    with contextlib.suppress(TimeoutError):
                        await asyncio.wait_for(self._freed.wait(), 0.1)
        except TimeoutError:
            raise _no_room() from None
        self._sizes[body] = size

    def release(self, body: Body) -> None:
        """Give the room of `body` to others."""
        self._sizes.pop(body, None)
        self._freed.set()


class Body:
    """The body of one request.

    arriving_since  a time of the event loop; infinite before the body arrives, and afterwards
    """

    def __init__(self, room: BodyRoom) -> None:
        self._room = room
        self._chunks: list[bytes] = []
        self._clock: asyncio.Timeout | None = None
        self._gave_way = False
        self.arriving_since = math.inf

    async def receive(self, receive: Receive, size: int) -> None:
        """Take the body in. Raises ApiError if it is larger than `size`, or comes too slowly."""
        await self._room.reserve(self, size)
        self.arriving_since = asyncio.get_running_loop().time()
        try:
            async with asyncio.timeout(BODY_SECONDS) as self._clock:
                more = True
                while more:
                    message = await receive()
                    if message["type"] == "http.disconnect":
                        raise ApiError(400, "the client has gone")
                    chunk, more = message.get("body", b""), message.get("more_body", False)
                    size -= len(chunk)
                    if size < 0:
                        raise too_large()
                    self._chunks.append(chunk)
        except TimeoutError:
            if self._gave_way:
                raise _no_room() from None
            raise ApiError(408, f"the body did not come within {BODY_SECONDS:.0f} seconds") from None
        self.arriving_since = math.inf

    async def decompress(self) -> None:
        """Put what gzip has made of the body in its place. Raises ApiError."""
        self._chunks = [await asyncio.to_thread(_decompressed, self._chunks)]

    def take(self) -> bytes:
        """Hand over all of it, once."""
        data = b"".join(self._chunks)
        self._chunks.clear()
        return data

    def drop(self) -> None:
        """Forget the body and give its room to others."""
        self._chunks.clear()
        self._room.release(self)

    def give_way(self) -> None:
        """Refuse the rest of the body, in favour of another."""
        self._gave_way, self.arriving_since = True, math.inf
        self.drop()
        assert self._clock is not None
        self._clock.reschedule(0)


def _decompressed(chunks: list[bytes]) -> bytes:
    unpacking, found, size = zlib.decompressobj(wbits=31), [], 0
    try:
        for chunk in chunks:
            found.append(unpacking.decompress(chunk, MAX_BODY - size + 1))
            size += len(found[-1])
            if size > MAX_BODY:
                raise too_large()
    except zlib.error:
        raise ApiError(400, "the body is not what gzip writes") from None
    if not unpacking.eof or unpacking.unused_data:
        raise ApiError(400, "the body is not what gzip writes: one stream, with its end")
    return b"".join(found)


def too_large() -> ApiError:
    """The error for a body beyond `MAX_BODY`."""
    return ApiError(413, f"the body must not exceed {MAX_BODY:,} bytes", "too_large")


def _no_room() -> ApiError:
    reason = "too many large bodies are under way; try again later"
    return ApiError(503, reason, "too_many_bodies", {"Retry-After": "5"})
