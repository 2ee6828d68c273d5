"""What has been written and not been sent, a row for each place that it was written in."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

from m7mlx_chat.store.rows import encodable
from m7mlx_chat.store.sound import Row
from m7mlx_chat.store.writer import Writer, as_json

_CLEARED = "cleared"


class Place(NamedTuple):
    """Where a draft belongs: at the end of a conversation, or in the place of a question in it.

    Without a conversation it is the first question of a new one.
    """

    conversation: int | None = None
    question: int | None = None

    @property
    def key(self) -> str:
        """The name of the row."""
        if self.question is not None:
            return f"question {self.question}"
        return "new" if self.conversation is None else f"conversation {self.conversation}"


class DraftWriter(Writer):
    """The drafts: `shown` is the text, `pastes` what markers in it stand for."""

    def keep_draft(self, place: Place, shown: str, pastes: Mapping[str, str]) -> None:
        """Keep a draft in the place of the one before; the last one kept is opened first."""
        self._keep(place.key, place.conversation, shown, pastes)

    def drop_draft(self, place: Place) -> None:
        """Forget a draft: it has been sent, or is what it was made of."""
        self._drop(place.key)

    def draft(self, place: Place) -> tuple[str, dict[str, str]] | None:
        """The draft of a place, if there is one."""
        return self._draft(place.key)

    def last_place(self, conversation: int | None) -> Place:
        """Where in a conversation a draft was written last."""
        if conversation is not None:
            newest = "SELECT place FROM draft WHERE conversation = ? ORDER BY updated DESC LIMIT 1"
            for row in self._rows(newest, [conversation]):
                kind, _, number = str(row["place"]).partition(" ")
                if kind == "question" and number.isdecimal():
                    return Place(conversation, int(number))
        return Place(conversation)

    def keep_waiting(self, place: Place, shown: str, pastes: Mapping[str, str]) -> None:
        """Keep what has been sent at a place, and waits for its turn."""
        self._keep(f"waiting {place.key}", place.conversation, shown, pastes)

    def drop_waiting(self, place: Place) -> None:
        """Forget it: nothing waits there any more."""
        self._drop(f"waiting {place.key}")

    def waiting(self, place: Place) -> tuple[str, dict[str, str]] | None:
        """What waited for its turn at a place."""
        return self._draft(f"waiting {place.key}")

    def keep_cleared(self, shown: str, pastes: Mapping[str, str]) -> None:
        """Keep the draft that the user cleared last."""
        self._keep(_CLEARED, None, shown, pastes)

    def drop_cleared(self) -> None:
        """Forget it."""
        self._drop(_CLEARED)

    def cleared(self) -> tuple[str, dict[str, str]] | None:
        """The draft that was cleared last."""
        return self._draft(_CLEARED)

    def _keep(self, key: str, conversation: int | None, shown: str, pastes: Mapping[str, str]) -> None:
        values = [key, conversation, self._clock(), encodable(shown), as_json(pastes)]
        with self._writing():
            self._db.execute("INSERT OR REPLACE INTO draft VALUES (?, ?, ?, ?, ?)", values)

    def _drop(self, key: str) -> None:
        if self._draft(key) is not None:
            with self._writing():
                self._db.execute("DELETE FROM draft WHERE place = ?", [key])

    def _draft(self, key: str) -> tuple[str, dict[str, str]] | None:
        for found in self._rows("SELECT shown, pastes FROM draft WHERE place = ?", [key]):
            row = Row(found)
            pastes = row.values("pastes")
            return row.text("shown"), {name: text for name, text in pastes.items() if isinstance(text, str)}
        return None
