"""Values out of rows that may be damaged: each of the type that it must have.

A database can be damaged by a disk, by another program, by a user with a tool. What can be read of
it is shown, and told; nothing is changed by reading.
"""

from __future__ import annotations

import json
import math
import sqlite3
from collections.abc import Sequence
from typing import Any, TypeVar, get_args

from m7mlx_chat.store.rows import LATEST, Conversation, Ending, Message, Role, encodable, tags_of

_LONGEST = 1000  # characters of a title or a model's name
_FIGURES = (
    "prompt_tokens",
    "reused_tokens",
    "prompt_tps",
    "generated_tokens",
    "generation_tps",
    "time_to_first_token",
    "peak_memory",
    "seen",
    "cache_bytes",
)
_T = TypeVar("_T")
_STATUSES = (*get_args(Ending), "answering", "interrupted")


def decoded(data: bytes) -> str:
    """SQLite's text, which need not be UTF-8."""
    return data.decode("utf-8", "replace")


class Row:
    """A row, and whether something in it was not what it must be."""

    def __init__(self, row: sqlite3.Row) -> None:
        self._row = row
        self.is_damaged = False

    def has(self, column: str) -> bool:
        return self._row[column] is not None

    def text(self, column: str, longest: int | None = None) -> str:
        value = self._row[column]
        if isinstance(value, bytes):
            value = decoded(self._not(value))
        elif not isinstance(value, str):
            value = "" if self._not(value) is None else str(value)
        return encodable(value[:longest])

    def number(self, column: str, most: float = LATEST) -> float:
        value = self._row[column]
        right = isinstance(value, int | float) and math.isfinite(value) and 0 <= value <= most
        return float(value) if right else self._not(0.0)

    def whole(self, column: str) -> int | None:
        value = self._row[column]
        return value if value is None or isinstance(value, int) else self._not(None)

    def one_of(self, column: str, choices: Sequence[Any], otherwise: Any) -> Any:
        value = self._row[column]
        return value if value in choices else self._not(otherwise)

    def data(self, column: str) -> bytes | None:
        value = self._row[column]
        return value if value is None or isinstance(value, bytes) else self._not(None)

    def values(self, column: str) -> dict[str, Any]:
        """A JSON object."""
        try:
            value = json.loads(self.text(column))
        except (ValueError, RecursionError):
            return self._not({})
        return dict(value) if isinstance(value, dict) else self._not({})

    def figures(self, column: str) -> dict[str, Any]:
        """A JSON object in which what must be a number is one; the rest of it as it is."""
        values = self.values(column)
        for name in _FIGURES:
            value = values.get(name, 0)
            if type(value) not in (int, float) or not math.isfinite(value) or not abs(value) < 1e18:
                del values[name]
                self._not(None)
        return values

    def _not(self, instead: _T) -> _T:
        self.is_damaged = True
        return instead


def message_of(row: Row) -> Message:
    return Message(
        id=row.whole("id") or 0,
        conversation=row.whole("conversation") or 0,
        parent=row.whole("parent"),
        role=row.one_of("role", get_args(Role), "user"),
        text=row.text("text"),
        status=row.one_of("status", _STATUSES, "interrupted"),
        created=row.number("created"),
        model=row.text("model", _LONGEST),
        settings=row.values("settings"),
        statistics=row.figures("statistics"),
        packed_ids=row.data("ids"),
        place=row.whole("place") or 1,
        siblings=row.whole("siblings") or 1,
    )


def conversation_of(row: Row) -> Conversation:
    return Conversation(
        id=row.whole("id") or 0,
        title=row.text("title", _LONGEST),
        automatic=bool(row.whole("automatic")),
        created=row.number("created"),
        updated=row.number("updated"),
        archived=bool(row.whole("archived")),
        pinned=bool(row.whole("pinned")),
        tags=tags_of(row.text("tags", _LONGEST)),
        deleted_at=row.number("deleted_at") if row.has("deleted_at") else None,
        model=row.text("model", _LONGEST),
        system=row.text("system"),
        settings=row.values("settings"),
        leaf=row.whole("leaf"),
        messages=row.whole("messages") or 0,
    )
