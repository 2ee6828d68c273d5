"""Searching: what a user types is text, never a query language; what is found shows where."""

from __future__ import annotations

import re
import sqlite3
from typing import get_args

from m7mlx_chat.store.rows import Hit, Role, encodable
from m7mlx_chat.store.sound import Row

# characters: of a pasted page its beginning will do; thousands of words take FTS5 minutes
_LONGEST = 300
_OPEN, _CLOSE = "\ufdd0", "\ufdd1"  # noncharacters: no text has business with them
# words, characters: where the index is damaged, a snippet can be all there is
_WORDS_AROUND, _MOST_AROUND = 14, 1000

# The words first (CROSS JOIN keeps the order): the best come out of FTS5 in order, and LIMIT ends
# the work.
SEARCH = f"""
    SELECT message.id, message.conversation, message.role, message.created, conversation.title, conversation.archived,
           snippet(message_words, 0, '{_OPEN}', '{_CLOSE}', '…', {_WORDS_AROUND}) AS snippet
    FROM message_words CROSS JOIN message ON message.id = message_words.rowid
         CROSS JOIN conversation ON conversation.id = message.conversation
    WHERE message_words MATCH ? AND conversation.deleted_at IS NULL
    ORDER BY message_words.rank LIMIT ?
"""


def match_of(text: str) -> str:
    """An FTS5 expression: all words of `text` as strings, the last as the beginning of a word.

    Empty if there is nothing to search for. Only the first 300 characters count.
    """
    words = encodable(text[:_LONGEST]).replace("\0", " ").split()
    words = [word for word in words if any(c.isalnum() for c in word)]
    # what is said twice costs twice, and finds the same
    words = [*dict.fromkeys(words[:-1]), *words[-1:]]
    quoted = ['"' + word.replace('"', '""') + '"' for word in words]
    return " ".join(quoted) + "*" if quoted else ""


def hit(row: sqlite3.Row) -> Hit:
    """A row of SEARCH."""
    found = Row(row)
    text, marks = _unmarked(" ".join(found.text("snippet", _MOST_AROUND).split()))
    return Hit(
        message=row["id"],
        conversation=row["conversation"],
        title=found.text("title", _MOST_AROUND),
        archived=bool(row["archived"]),
        role=found.one_of("role", get_args(Role), "user"),
        created=found.number("created"),
        snippet=text,
        marks=marks,
    )


def _unmarked(snippet: str) -> tuple[str, tuple[tuple[int, int], ...]]:
    """The text without the marks, and where they were."""
    text, marks, start = "", [], 0
    for part in re.split(f"([{_OPEN}{_CLOSE}])", snippet):
        if part == _OPEN:
            start = len(text)
        elif part == _CLOSE:
            marks.append((start, len(text)))
        else:
            text += part
    return text, tuple(marks)
