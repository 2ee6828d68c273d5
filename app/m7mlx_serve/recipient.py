"""Where pieces of answers go: from the engine's thread to the event loops of those who asked."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Iterable, Sequence

from m7mlx import Piece


class Recipient:
    """Whoever waits for one answer.

    number  the scheduler's for the request; 0 before it has one
    index   which of the answers to a request it is
    until   when the answer has to have ended (time.monotonic)
    """

    def __init__(
        self,
        loop: asyncio.AbstractEventLoop,
        pieces: asyncio.Queue[tuple[int, Piece]],
        index: int,
        until: float,
    ) -> None:
        self.number = 0
        self.loop, self.index, self.until = loop, index, until
        self._pieces = pieces

    def receive(self, piece: Piece) -> None:
        """Take a piece; on the recipient's event loop."""
        self._pieces.put_nowait((self.index, piece))


def send(told: Iterable[tuple[Recipient, Piece]]) -> None:
    """Hand over pieces from another thread. Each loop is woken once, not once for every answer."""
    by_loop: dict[asyncio.AbstractEventLoop, list[tuple[Recipient, Piece]]] = {}
    for recipient, piece in told:
        by_loop.setdefault(recipient.loop, []).append((recipient, piece))
    for loop, pairs in by_loop.items():
        with contextlib.suppress(RuntimeError):  # the loop has ended: nobody listens any more
            loop.call_soon_threadsafe(_receive, pairs)


def _receive(told: Sequence[tuple[Recipient, Piece]]) -> None:
    for recipient, piece in told:
        recipient.receive(piece)
