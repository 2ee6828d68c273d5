"""The memory that vectors take which are made, or wait for their client to read them."""

from __future__ import annotations

import asyncio
import contextlib
import math
from collections.abc import AsyncIterator

from m7mlx_serve.errors import ApiError

MOST, SMALL = 256 << 20, 64 << 10  # bytes of all vectors; of one request's that always find room
ROOM_SECONDS = 10.0  # that a request waits for room
READING_SECONDS = 10.0  # that a client may take to read its vectors while others wait for room


class VectorRoom:
    """The memory that the vectors of all requests share.

    Few vectors always find room. Where there is none for many, what has been read for longest by
    its client is cut off, if that has had its time.
    """

    def __init__(self, most: int = MOST) -> None:
        self._most = most
        self._places: dict[VectorPlace, int] = {}  # bytes of each
        self._line = asyncio.Lock()
        self._freed = asyncio.Event()

    async def take(self, size: int) -> VectorPlace:
        """Wait until there is room for `size` bytes. Raises ApiError if that takes too long."""
        place = VectorPlace(self)
        if size <= SMALL:
            return place
        try:
            async with asyncio.timeout(ROOM_SECONDS), self._line:
                while self._places and sum(self._places.values()) + size > self._most:
                    late = asyncio.get_running_loop().time() - READING_SECONDS
                    for other in [one for one in self._places if one.read_since < late][:1]:
                        other.cut_off()
                    self._freed.clear()
                    with contextlib.suppress(TimeoutError):
                        await asyncio.wait_for(self._freed.wait(), 0.1)
        except TimeoutError:
            reason = "too many vectors are under way; try again later, or ask for fewer at a time"
            raise ApiError(503, reason, "too_many_vectors", {"Retry-After": "5"}) from None
        self._places[place] = size
        return place

    def release(self, place: VectorPlace) -> None:
        """Give the room of `place` to others."""
        self._places.pop(place, None)
        self._freed.set()


class VectorPlace:
    """The room of one request's vectors.

    read_since  when its client began to read (a time of the event loop); infinite before that
    """

    def __init__(self, room: VectorRoom) -> None:
        self._room = room
        self._clock: asyncio.Timeout | None = None
        self.read_since = math.inf

    @contextlib.asynccontextmanager
    async def reading(self) -> AsyncIterator[None]:
        """Keep the room while the client reads, and give it back.

        Raises TimeoutError if another's vectors need it before the client has read all.
        """
        try:
            async with asyncio.timeout(None) as self._clock:
                self.read_since = asyncio.get_running_loop().time()
                yield
        finally:
            self.release()

    def cut_off(self) -> None:
        """End the reading, in favour of another's vectors."""
        self.read_since = math.inf
        assert self._clock is not None
        self._clock.reschedule(0)

    def release(self) -> None:
        """Give the room back."""
        self._room.release(self)
