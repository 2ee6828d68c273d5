"""What can be asked of the stored conversations. No method here changes anything.

Conversations may have 10,000 messages and more: what a call costs depends on what it returns, not
on what there is.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Callable, Iterable, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any, TypeVar, get_args

from m7mlx_chat.store.errors import StoreError
from m7mlx_chat.store.rows import Conversation, Ending, Head, Hit, Message, Node, Role, Tree, tags_of, title_of
from m7mlx_chat.store.schema import damaged, one_line
from m7mlx_chat.store.sound import Row, conversation_of, message_of
from m7mlx_chat.store.words import HAS_TAG, hit, match_of, parts_query, plain, words_query

EVERYTHING = -1  # SQLite's LIMIT
_T = TypeVar("_T")
_ROLES = get_args(Role)
_STATUSES = (*get_args(Ending), "answering", "interrupted")

# `IS` also finds the siblings of roots, whose parent is NULL.
_MESSAGE = """
    SELECT m.*,
        (SELECT count(*) FROM message s
            WHERE s.conversation = m.conversation AND s.parent IS m.parent AND s.id <= m.id) AS place,
        (SELECT count(*) FROM message s WHERE s.conversation = m.conversation AND s.parent IS m.parent) AS siblings
    FROM message m
"""
# From a message up to its root by primary keys; LIMIT ends the walk, not only the answer. A parent
# is older than its child: where the file is damaged, and it is not, the walk ends there, rather
# than go round for ever.
_BRANCH = f"""
    WITH RECURSIVE path (id, parent, up) AS (
        SELECT id, parent, 0 FROM message WHERE id = :first
        UNION ALL
        SELECT message.id, message.parent, up + 1 FROM path CROSS JOIN message ON message.id = path.parent
            AND message.id < path.id
        LIMIT :limit
    )
    {_MESSAGE} JOIN path ON path.id = m.id ORDER BY path.up DESC
"""
_LINE = """
    WITH RECURSIVE path (id, parent) AS (
        SELECT id, parent FROM message WHERE id = ?
        UNION ALL
        SELECT message.id, message.parent FROM path CROSS JOIN message ON message.id = path.parent
            AND message.id < path.id
    )
    SELECT id FROM path ORDER BY id
"""
# Messages are counted for those that are returned only.
_COUNTED = "SELECT c.*, (SELECT count(*) FROM message WHERE conversation = c.id) AS messages FROM"
_NEWEST = "ORDER BY updated DESC, id DESC"
_LIST = f"""
    {_COUNTED} (
        SELECT * FROM conversation WHERE archived = ? AND deleted_at IS NULL {_NEWEST} LIMIT ? OFFSET ?
    ) c {_NEWEST}
"""
_DELETED = f"{_COUNTED} conversation c WHERE deleted_at IS NOT NULL ORDER BY deleted_at DESC, id DESC LIMIT ?"
_PINNED = f"{_COUNTED} conversation c WHERE pinned AND archived = ? AND deleted_at IS NULL {_NEWEST}"
_TITLES = f"SELECT id, title FROM conversation WHERE deleted_at IS NULL{{}} {_NEWEST}"
_IS_A_TAG = f"SELECT 1 FROM conversation WHERE tags != '' AND deleted_at IS NULL{HAS_TAG} LIMIT 1"
_PROMPTS = """
    SELECT CAST(text AS TEXT) FROM message m CROSS JOIN conversation ON conversation.id = m.conversation
    WHERE m.role = 'user' AND deleted_at IS NULL ORDER BY m.created DESC, m.id DESC
"""


class Reader:
    """The open database, as far as it is read."""

    def __init__(self, path: Path, db: sqlite3.Connection) -> None:
        self.path = path
        self._db = db
        self._version: int | None = None
        self.damaged: set[str] = set()  # what was found that is not as it must be: "message 7"

    def message(self, message: int) -> Message:
        """One message."""
        found = self._messages(f"{_MESSAGE} WHERE m.id = ?", [message])
        return _only(found, f"there is no message {message} (any more)")

    def branch(self, leaf: int, limit: int = EVERYTHING, before: int | None = None) -> list[Message]:
        """The last `limit` messages from the root to `leaf`, in order; or those before `before`."""
        first = leaf if before is None else self.message(before).parent
        return self._messages(_BRANCH, {"first": first, "limit": limit})

    def line(self, leaf: int) -> list[int]:
        """The ids of all messages from the root to `leaf`, without reading the messages."""
        return [row["id"] for row in self._rows(_LINE, [leaf])]

    def shown(self, head: Conversation) -> list[int]:
        """The ids of all messages of the branch shown.

        Where its end is not there any more, the branch of the newest message is shown.
        """
        line = [] if head.leaf is None else self.line(head.leaf)
        if not line and head.messages:
            self.damaged.add(f"conversation {head.id}")
            newest = "SELECT max(id) AS id FROM message WHERE conversation = ?"
            line = self.line(self._rows(newest, [head.id])[0]["id"])
        return line

    def read(self, messages: Sequence[int]) -> list[Message]:
        """Some messages of a path, in its order."""
        marks = ", ".join("?" * len(messages))
        return self._messages(f"{_MESSAGE} WHERE m.id IN ({marks}) ORDER BY m.id", list(messages))

    def siblings(self, message: int) -> list[Message]:
        """A message and all others with its parent, oldest first."""
        one = self.message(message)
        same = "m.parent IS (SELECT parent FROM message WHERE id = ?)"
        return self._messages(
            f"{_MESSAGE} WHERE m.conversation = ? AND {same} ORDER BY m.id", [one.conversation, message]
        )

    def answers(self, question: int) -> list[Message]:
        """All answers to a question, oldest first."""
        one = self.message(question)
        where = "WHERE m.conversation = ? AND m.parent = ? ORDER BY m.id"
        return self._messages(f"{_MESSAGE} {where}", [one.conversation, question])

    def conversation(self, conversation: int) -> Conversation:
        """One conversation, deleted or not."""
        found = self._conversations(f"{_COUNTED} conversation c WHERE id = ?", [conversation])
        return _only(found, f"there is no conversation {conversation} (any more)")

    def conversations(self, archived: bool = False, limit: int = EVERYTHING, offset: int = 0) -> list[Conversation]:
        """Those that are not deleted, and archived or not; the last one spoken in first."""
        return self._conversations(_LIST, [archived, limit, offset])

    def pinned(self, archived: bool = False) -> list[Conversation]:
        """Those of `conversations` that are pinned."""
        return self._conversations(_PINNED, [archived])

    def count(self, archived: bool = False) -> int:
        """How many `conversations` there are."""
        sql = "SELECT count(*) FROM conversation WHERE archived = ? AND deleted_at IS NULL"
        return int(self._rows(sql, [archived])[0][0])

    def deleted(self, limit: int = EVERYTHING) -> list[Conversation]:
        """Those that are deleted and not erased yet; the last one deleted first."""
        return self._conversations(_DELETED, [limit])

    def tree(self, conversation: int) -> Tree:
        """A whole conversation, all branches, for export."""
        head = self.conversation(conversation)
        messages = self._messages(f"{_MESSAGE} WHERE m.conversation = ? ORDER BY m.id", [conversation])
        return tree_of(head, messages, head.leaf)

    def tags_in(self, text: str) -> tuple[list[str], str]:
        """The tags that `text` searches for, and the rest of it.

        "#work" is a tag where a conversation has one that begins so, and text elsewhere.
        """
        tags, rest = list[str](), list[str]()
        for word in text.split():
            tag = tags_of(word) if word.startswith("#") else ()
            if tag and self._rows(_IS_A_TAG, tag[:1]):
                tags += tag[:1]
            else:
                rest.append(word)
        return (tags, " ".join(rest)) if tags else ([], text)

    def search(self, text: str, limit: int = 50) -> list[Hit]:
        """The messages with all words of `text`, the best first; then those with all its parts.

        Where it has tags, those of conversations that have them.
        """
        tags, text = self.tags_in(text)
        match = match_of(text)
        found = [hit(row) for row in self._rows(*words_query(match, limit, tags))] if match else []
        parts = parts_query(text, limit, tags) if len(found) < limit else None
        if parts is not None:
            known = {one.message for one in found}
            found += [hit(row) for row in self._rows(*parts) if row["id"] not in known]
        return found[:limit]

    def titled(self, text: str, limit: int = 20) -> list[Conversation]:
        """The conversations whose titles have all parts of `text`, the last one spoken in first.

        Where it has tags, those that have them.
        """
        tags, text = self.tags_in(text)
        parts = plain(text).split()
        if not parts and not tags:
            return []
        rows = self._rows(_TITLES.format(HAS_TAG * len(tags)), tags)
        ids = [row["id"] for row in rows if all(part in plain(Row(row).text("title")) for part in parts)][:limit]
        marks = ", ".join("?" * len(ids))
        return self._conversations(f"{_COUNTED} conversation c WHERE id IN ({marks}) {_NEWEST}", ids)

    def first_words(self, conversation: int) -> str:
        """The title that a conversation has from its first question."""
        first = "SELECT text FROM message WHERE conversation = ? AND role = 'user' ORDER BY id LIMIT 1"
        return title_of("".join(Row(row).text("text") for row in self._rows(first, [conversation])))

    def prompts(self, containing: str = "", limit: int = 100) -> list[str]:
        """What the user has asked and contains a text, in any case: each once, the newest first."""
        needle, found = containing.casefold(), dict[str, None]()
        with one_line(self.path), closing(self._db.execute(_PROMPTS)) as rows:
            for (text,) in rows:
                if len(found) >= limit:
                    break
                if text is not None and needle in text.casefold():
                    found[text] = None
        return list(found)

    def changed_elsewhere(self) -> bool:
        """Whether another instance has written since this was asked last."""
        version = self._rows("PRAGMA data_version", [])[0][0]
        before, self._version = self._version, version
        return before not in (None, version)

    def _rows(self, sql: str, values: Any) -> list[sqlite3.Row]:
        with one_line(self.path):
            return self._db.execute(sql, values).fetchall()

    def _messages(self, sql: str, values: Any) -> list[Message]:
        return self._built("message", message_of, sql, values)

    def _conversations(self, sql: str, values: Any) -> list[Conversation]:
        return self._built("conversation", conversation_of, sql, values)

    def _built(self, kind: str, build: Callable[[Row], _T], sql: str, values: Any) -> list[_T]:
        found = []
        try:
            for row in map(Row, self._rows(sql, values)):
                found.append(build(row))
                if row.is_damaged:
                    self.damaged.add(f"{kind} {row.whole('id')}")
        except IndexError as error:  # no column where there was one
            raise damaged(self.path, error) from None
        return found


def tree_of(head: Head, messages: Iterable[Message], leaf: int | None) -> Tree:
    """Messages as a tree of their own; each parent comes before its children or is left out."""
    index: dict[int | None, int] = {}
    nodes = []
    for message in messages:
        nodes.append(
            Node(
                parent=index.get(message.parent),
                role=message.role,
                text=message.text,
                status="interrupted" if message.status == "answering" else message.status,
                created=message.created,
                model=message.model,
                settings=message.settings,
                statistics=message.statistics,
                packed_ids=message.packed_ids,
            )
        )
        index[message.id] = len(nodes) - 1
    return Tree(
        title=head.title,
        automatic=head.automatic,
        created=head.created,
        updated=head.updated,
        archived=head.archived,
        pinned=head.pinned,
        tags=head.tags,
        model=head.model,
        system=head.system,
        settings=head.settings,
        leaf=index.get(leaf),
        nodes=tuple(nodes),
    )


def _only(found: list[_T], missing: str) -> _T:
    if not found:
        raise StoreError(f"{missing}; look at the list of conversations again")
    return found[0]
