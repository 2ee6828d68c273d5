"""Responses that are held, in bounded memory, for those that go on from them."""

from __future__ import annotations

import re
from collections import OrderedDict, defaultdict
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
    """Holds responses by id, each for the clients of one key alone (`space`).

    Where there is no room for one more, the key that takes most of it gives up what it used least
    recently: no key can have all others' responses forgotten.
    """

    def __init__(self, most_bytes: int = MOST_BYTES, most: int = MOST) -> None:
        self._held: defaultdict[str, OrderedDict[str, Held]] = defaultdict(OrderedDict)
        self._sizes: defaultdict[str, int] = defaultdict(int)  # in bytes
        self._most_bytes, self._most = most_bytes, most

    def put(self, space: str, id: str, held: Held) -> None:
        """Hold a response, in the place of those that were used least recently."""
        self.drop(space, id)
        self._held[space][id] = held
        self._sizes[space] += _size(held)
        while sum(self._sizes.values()) > self._most_bytes:
            self._drop_oldest(max(self._sizes, key=self._sizes.__getitem__))
        while sum(map(len, self._held.values())) > self._most:
            self._drop_oldest(max(self._held, key=lambda one: len(self._held[one])))

    def find(self, space: str, id: str) -> Held | None:
        """The response of that id, if it is held."""
        found = self._held[space].get(id) if space in self._held else None
        if found is not None:
            self._held[space].move_to_end(id)
        return found

    def drop(self, space: str, id: str) -> bool:
        """Hold a response no longer; return whether it was held."""
        held = self._held[space].pop(id, None) if space in self._held else None
        if held is not None:
            self._sizes[space] -= _size(held)
        return held is not None

    def _drop_oldest(self, space: str) -> None:
        self.drop(space, next(iter(self._held[space])))

    def mentioned(self, space: str, data: bytes) -> dict[str, bytes]:
        """The conversations that a body may go on from, by id: those whose ids stand in it.

        The body is read elsewhere (`m7mlx_serve.readers`), where nothing is held.
        """
        if b'"previous_response_id"' not in data:
            return {}
        ids = dict.fromkeys(found[1].decode() for found in _ID.finditer(data))
        known = [id for id in ids if id in self._held.get(space, ())][:_MENTIONED]
        return {id: held.messages for id in known if (held := self.find(space, id))}


def _size(held: Held) -> int:
    return len(held.reply) + len(held.messages)
