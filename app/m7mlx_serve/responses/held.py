"""Responses that are held, in bounded memory, for those that go on from them."""

from __future__ import annotations

import re
from collections import OrderedDict
from dataclasses import dataclass

MOST_BYTES, MOST = 64 << 20, 1000  # of all responses; what was used least recently leaves
_ID = re.compile(rb'"(resp_[0-9a-f]{32})"')
_MENTIONED = 8  # ids in a body that are looked up


@dataclass(frozen=True)
class Held:
    """A response, and the conversation that it ends, both as JSON."""

    reply: bytes
    messages: bytes


class HeldResponses:
    """Holds responses by id, each for the clients of one key alone (`space`)."""

    def __init__(self, most_bytes: int = MOST_BYTES, most: int = MOST) -> None:
        self._held: OrderedDict[tuple[str, str], Held] = OrderedDict()
        self._most_bytes, self._most, self._size = most_bytes, most, 0

    def put(self, space: str, id: str, held: Held) -> None:
        """Hold a response, in the place of those that were used least recently."""
        self.drop(space, id)
        self._held[space, id] = held
        self._size += _size(held)
        while self._size > self._most_bytes or len(self._held) > self._most:
            self.drop(*next(iter(self._held)))

    def find(self, space: str, id: str) -> Held | None:
        """The response of that id, if it is held."""
        if (space, id) in self._held:
            self._held.move_to_end((space, id))
        return self._held.get((space, id))

    def drop(self, space: str, id: str) -> bool:
        """Hold a response no longer; return whether it was held."""
        held = self._held.pop((space, id), None)
        self._size -= _size(held) if held else 0
        return held is not None

    def mentioned(self, space: str, data: bytes) -> dict[str, bytes]:
        """The conversations that a body may go on from, by id: those whose ids stand in it.

        The body is read elsewhere (`m7mlx_serve.readers`), where nothing is held.
        """
        if b'"previous_response_id"' not in data:
            return {}
        ids = dict.fromkeys(found[1].decode() for found in _ID.finditer(data))
        known = [id for id in ids if (space, id) in self._held][:_MENTIONED]
        return {id: held.messages for id in known if (held := self.find(space, id))}


def _size(held: Held) -> int:
    return len(held.reply) + len(held.messages)
