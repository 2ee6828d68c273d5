"""Turns in which connections parse what has arrived, a little at a time."""

from __future__ import annotations

import asyncio
import time
from collections import deque
from typing import Protocol

_TURN_SECONDS = 0.003


class Parser(Protocol):
    """A connection, as far as its turn is concerned."""

    loop: asyncio.AbstractEventLoop

    @property
    def reads_headers(self) -> bool:
        """Whether the headers of a request are next."""

    def parse_some(self) -> None:
        """Parse a little, and ask for another turn if something is left."""


class Turns:
    """Lets connections parse for a few milliseconds in each turn of the loop, headers first.

    To parse one read full of chunks of one byte takes a tenth of a second, and each connection may
    send such reads.
    """

    def __init__(self) -> None:
        self._headers: deque[Parser] = deque()
        self._bodies: deque[Parser] = deque()
        self._is_scheduled = False

    def add(self, parser: Parser) -> None:
        """Give `parser` a turn."""
        (self._headers if parser.reads_headers else self._bodies).append(parser)
        if not self._is_scheduled:
            self._is_scheduled = True
            parser.loop.call_soon(self._take, parser.loop)

    def _take(self, loop: asyncio.AbstractEventLoop) -> None:
        until = time.perf_counter() + _TURN_SECONDS
        while (queue := self._headers or self._bodies) and time.perf_counter() < until:
            queue.popleft().parse_some()
        self._is_scheduled = bool(queue)
        if self._is_scheduled:
            loop.call_soon(self._take, loop)
