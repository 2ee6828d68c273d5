"""Searching: what a user types is text, never a query language; what is found shows where.

Words find themselves, their beginnings and other spellings ("osterreich" finds Österreich), the
best first. After those come the messages that have what was typed anywhere, in the middle of a word
or in a script without spaces, the newest first.
"""

from __future__ import annotations

import re
import sqlite3
import unicodedata
from collections.abc import Sequence
from typing import Any, get_args

from m7mlx_chat.store.rows import Hit, Role, encodable
from m7mlx_chat.store.sound import Row

# characters: of a pasted page its beginning will do; thousands of words take FTS5 minutes
_LONGEST = 300
_OPEN, _CLOSE = "\ufdd0", "\ufdd1"  # noncharacters: no text has business with them
# words, characters: where the index is damaged, a snippet can be all there is
_WORDS_AROUND, _MOST_AROUND = 14, 1000
_CHARACTERS_AROUND = 64  # the most that FTS5 gives, where a token is a character
_TRIGRAM = 3  # characters: what is shorter is not in the index of parts

_COLUMNS = """
    SELECT message.id, message.conversation, message.role, message.created, conversation.title, conversation.archived,
"""
# Of a conversation: it has a tag that begins so.
HAS_TAG = " AND instr(' ' || conversation.tags, ' ' || ?)"
# The words first (CROSS JOIN keeps the order): the best come out of FTS5 in order, and LIMIT ends
# the work.
_SEARCH = f"""
    {_COLUMNS} snippet(message_words, 0, '{_OPEN}', '{_CLOSE}', '…', {_WORDS_AROUND}) AS snippet
    FROM message_words CROSS JOIN message ON message.id = message_words.rowid
         CROSS JOIN conversation ON conversation.id = message.conversation
    WHERE message_words MATCH ? AND conversation.deleted_at IS NULL
"""
_PARTS = f"""
    {_COLUMNS} snippet(message_parts, 0, '{_OPEN}', '{_CLOSE}', '…', {_CHARACTERS_AROUND}) AS snippet
    FROM message_parts CROSS JOIN message ON message.id = message_parts.rowid
         CROSS JOIN conversation ON conversation.id = message.conversation
    WHERE message_parts MATCH ? AND conversation.deleted_at IS NULL
"""
# Too short for an index: all texts, up to the first `LIMIT` that have it.
_SCAN = f"""
    {_COLUMNS} substr(message.text, max(1, instr(message.text, ?) - 20), {_CHARACTERS_AROUND}) AS snippet
    FROM message CROSS JOIN conversation ON conversation.id = message.conversation
    WHERE conversation.deleted_at IS NULL
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


def words_query(match: str, limit: int, tags: Sequence[str] = ()) -> tuple[str, list[Any]]:
    """SQL, and its values, for messages that an expression of `match_of` finds, the best first.

    tags  that their conversations have
    """
    sql = _SEARCH + HAS_TAG * len(tags)
    return f"{sql} ORDER BY message_words.rank LIMIT ?", [match, *tags, limit]


def parts_query(text: str, limit: int, tags: Sequence[str] = ()) -> tuple[str, list[Any]] | None:
    """SQL, and its values, for messages with all parts of `text`; None for no parts."""
    parts = list(dict.fromkeys(encodable(text[:_LONGEST]).replace("\0", " ").split()))
    parts = [part for part in parts if any(c.isalnum() or not c.isascii() for c in part)]
    if not parts:
        return None
    long = [part for part in parts if len(part) >= _TRIGRAM]
    short = [part for part in parts if len(part) < _TRIGRAM]
    quoted = " ".join('"' + part.replace('"', '""') + '"' for part in long)
    sql, values = (_PARTS, [quoted]) if long else (_SCAN, [short[0]])
    sql += " AND message.text LIKE ? ESCAPE '\\'" * len(short)
    values += ["%" + re.sub(r"([%_\\])", r"\\\1", part) + "%" for part in short]
    sql += HAS_TAG * len(tags)
    return f"{sql} ORDER BY message.id DESC LIMIT ?", [*values, *tags, limit]


def plain(text: str) -> str:
    """A text as titles are compared: without case and accents."""
    decomposed = unicodedata.normalize("NFKD", text.casefold())
    return "".join(c for c in decomposed if not unicodedata.combining(c))


def hit(row: sqlite3.Row) -> Hit:
    """A row of `words_query` or `parts_query`."""
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
