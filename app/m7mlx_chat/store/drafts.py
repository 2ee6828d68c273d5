"""What has been written and not been sent, a row for each place that it was written in.

Several instances may write in one place: each has a row of its own, and none writes over another's
text. Where an instance has none yet, it begins with the newest there is. What an instance leaves
behind belongs to nobody, until one that lives goes on with it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import suppress
from typing import NamedTuple

from m7mlx.errors import M7Error
from m7mlx_chat.store.rows import encodable
from m7mlx_chat.store.sound import Row
from m7mlx_chat.store.writer import Writer, as_json

_CLEARED = "cleared"
_OURS_OR_NOBODYS = "AND (owner = ? OR owner IS NULL)"
# Our own comes first, then what has a text, then the newest.
_OURS_FIRST = "ORDER BY owner IS ? DESC, shown = '', updated DESC LIMIT 1"


class Place(NamedTuple):
    """Where a draft belongs: at the end of a conversation, or in the place of a message in it.

    Without a conversation it is the first question of a new one.
    """

    conversation: int | None = None
    message: int | None = None

    @property
    def key(self) -> str:
        """The name of the row."""
        if self.message is not None:
            return f"question {self.message}"  # or an answer: ids say which
        return "new" if self.conversation is None else f"conversation {self.conversation}"


class DraftWriter(Writer):
    """The drafts: `shown` is the text, `pastes` what markers in it stand for."""

    def keep_draft(self, place: Place, shown: str, pastes: Mapping[str, str]) -> None:
        """Keep our draft in the place of the one before; the last one kept is opened first."""
        with self._writing():
            self._keep(place.key, place.conversation, shown, pastes)

    def drop_draft(self, place: Place) -> None:
        """Forget our draft: it has been sent, or is what it was made of."""
        self._drop(place.key)

    def draft(self, place: Place) -> tuple[str, dict[str, str]] | None:
        """The draft of a place, if there is one; nobody's becomes ours."""
        return self._take(place.key)

    def last_place(self, conversation: int | None) -> Place:
        """Where in a conversation a draft was written last, by us if we have written in it."""
        if conversation is not None:
            newest = "SELECT place FROM draft WHERE conversation = ? ORDER BY owner IS ? DESC, updated DESC LIMIT 1"
            for row in self._rows(newest, [conversation, self._instance.name]):
                kind, _, number = str(row["place"]).partition(" ")
                if kind == "question" and number.isdecimal():
                    return Place(conversation, int(number))
        return Place(conversation)

    def keep_waiting(self, place: Place, shown: str, pastes: Mapping[str, str]) -> None:
        """Keep what has been sent at a place, and waits for its turn."""
        with self._writing():
            self._keep(f"waiting {place.key}", place.conversation, shown, pastes)

    def drop_waiting(self, place: Place) -> None:
        """Forget it: nothing waits there any more."""
        self._drop(f"waiting {place.key}")

    def waiting(self, place: Place) -> tuple[str, dict[str, str]] | None:
        """What waited for its turn at a place, here or in a window that has ended."""
        return self._take(f"waiting {place.key}", _OURS_OR_NOBODYS, [self._instance.name])

    def keep_cleared(self, shown: str, pastes: Mapping[str, str]) -> None:
        """Keep the draft that the user cleared last; those of windows that have ended go."""
        with self._writing():
            self._db.execute("DELETE FROM draft WHERE place = ? AND owner IS NULL", [_CLEARED])
            self._keep(_CLEARED, None, shown, pastes)

    def drop_cleared(self) -> None:
        """Forget it."""
        self._drop(_CLEARED, _OURS_OR_NOBODYS)

    def cleared(self) -> tuple[str, dict[str, str]] | None:
        """The draft that was cleared last, here or in a window that has ended."""
        ours = f"SELECT * FROM draft WHERE place = ? {_OURS_OR_NOBODYS} {_OURS_FIRST}"
        name = self._instance.name
        return next((_text_of(Row(found)) for found in self._rows(ours, [_CLEARED, name, name])), None)

    def _keep(self, key: str, conversation: int | None, shown: str, pastes: Mapping[str, str]) -> None:
        values = [key, self._instance.name, conversation, self.clock(), encodable(shown), as_json(pastes)]
        self._db.execute("INSERT OR REPLACE INTO draft VALUES (?, ?, ?, ?, ?, ?)", values)

    def _drop(self, key: str, whose: str = "AND owner = ?") -> None:
        ours = f"FROM draft WHERE place = ? {whose}"
        if self._rows(f"SELECT 1 {ours}", [key, self._instance.name]):
            with self._writing():
                self._db.execute(f"DELETE {ours}", [key, self._instance.name])

    def _take(self, key: str, whose: str = "", values: Sequence[str] = ()) -> tuple[str, dict[str, str]] | None:
        """The first text of a place; what is nobody's becomes ours."""
        name = self._instance.name
        first = f"SELECT rowid AS number, * FROM draft WHERE place = ? {whose} {_OURS_FIRST}"
        for found in self._rows(first, [key, *values, name]):
            if found["owner"] is None:
                # where nothing can be written, it is shown all the same
                with suppress(M7Error), self._writing():
                    self._db.execute("UPDATE draft SET owner = ? WHERE rowid = ?", [name, found["number"]])
            return _text_of(Row(found))
        return None

    def _release(self, whose: str, values: Sequence[str]) -> None:
        """Let the drafts of instances that have ended belong to nobody."""
        where = f"WHERE owner IS NOT NULL AND {whose}"
        if self._rows(f"SELECT 1 FROM draft {where} LIMIT 1", values):
            with self._writing():
                self._db.execute(f"UPDATE draft SET owner = NULL {where}", values)


def _text_of(row: Row) -> tuple[str, dict[str, str]]:
    pastes = row.values("pastes")
    return row.text("shown"), {name: text for name, text in pastes.items() if isinstance(text, str)}
