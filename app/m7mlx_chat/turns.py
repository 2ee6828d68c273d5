"""Messages that were sent while the model was answering: each waits for its turn.

They are on the disk, beside the drafts. Whatever ends the program, they come back as a draft.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import NamedTuple

from m7mlx_chat.store import Store
from m7mlx_chat.store.drafts import Place
from m7mlx_chat.unsent import UnsentText, joined


class Turn(NamedTuple):
    """A message, and the end of the conversation where it is to be asked."""

    place: Place
    unsent: UnsentText


class Turns:
    """All that waits, in whichever conversation; who came first is asked first."""

    def __init__(self, store: Store, telling: Callable[[], AbstractContextManager[None]]) -> None:
        """`telling` makes a block in which an error is told, and the program goes on."""
        self._store = store
        self._telling = telling
        self._turns: list[Turn] = []

    @property
    def first(self) -> Turn | None:
        """The message whose turn is next."""
        return self._turns[0] if self._turns else None

    def at(self, place: Place) -> list[UnsentText]:
        """What waits at a place, in its order."""
        return [turn.unsent for turn in self._turns if turn.place == place]

    def add(self, place: Place, unsent: UnsentText) -> None:
        """Let a message wait."""
        self._turns.append(Turn(place, unsent))
        self._write(place)

    def take_first(self, conversation: int) -> Turn:
        """Forget the first message: it has been asked in a conversation.

        Where it began that, what waits behind it at its place goes there too.
        """
        turn = self._turns.pop(0)
        if turn.place.conversation is None:
            here = Place(conversation)
            self._turns = [Turn(here, one.unsent) if one.place == turn.place else one for one in self._turns]
            self._write(here)
        self._write(turn.place)
        return turn

    def drop(self, place: Place) -> None:
        """Forget what waits at a place: it is part of a draft that is on the disk."""
        self._turns = [turn for turn in self._turns if turn.place != place]
        self._write(place)

    def give_up(self) -> None:
        """Let nothing have its turn; all of it comes back as `left_over`."""
        self._turns = []

    def left_over(self, place: Place) -> UnsentText | None:
        """What waited at a place, and will not have its turn: the program ended before, say."""
        if self.at(place):
            return None
        with self._telling():
            if (found := self._store.waiting(place)) is not None:
                return UnsentText(*found)
        return None

    def _write(self, place: Place) -> None:
        with self._telling():
            if texts := self.at(place):
                unsent = joined(texts)
                self._store.keep_waiting(place, unsent.shown, unsent.pastes)
            else:
                self._store.drop_waiting(place)
