"""How a change is written: whole or not at all. `Store` says which changes there are."""

from __future__ import annotations

import json
import sqlite3
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from m7mlx_chat.store.errors import StoreError
from m7mlx_chat.store.instances import Instance
from m7mlx_chat.store.reader import Reader
from m7mlx_chat.store.rows import Head, Node, encodable, stored_tags
from m7mlx_chat.store.schema import one_line, transaction

Values = Mapping[str, Any]  # as JSON knows them


class Writer(Reader):
    """The open database, and the instance whose answers are written."""

    def __init__(
        self,
        path: Path,
        db: sqlite3.Connection,
        instance: Instance,
        clock: Callable[[], float],
    ) -> None:
        super().__init__(path, db)
        self.clock = clock
        self._instance = instance

    @contextmanager
    def _writing(self) -> Iterator[None]:
        with one_line(self.path), transaction(self._db):
            yield

    def _add_conversation(self, head: Head) -> int:
        values = {
            "title": encodable(head.title),
            "automatic": head.automatic,
            "created": head.created,
            "updated": head.updated,
            "archived": head.archived,
            "pinned": head.pinned,
            "tags": stored_tags(head.tags),
            "model": encodable(head.model),
            "system": encodable(head.system),
            "settings": as_json(head.settings),
        }
        return self._insert("conversation", values)

    def _add_message(self, conversation: int, node: Node) -> int:
        values = {
            "conversation": conversation,
            "parent": node.parent,
            "role": node.role,
            "status": node.status,
            "created": node.created,
            "owner": self._instance.name if node.status == "answering" else None,
            "model": encodable(node.model),
            "settings": as_json(node.settings),
            "statistics": as_json(node.statistics),
            "text": encodable(node.text),
            "ids": node.packed_ids,
        }
        return self._insert("message", values)

    def _insert(self, table: str, values: Values) -> int:
        sql = f"INSERT INTO {table} ({', '.join(values)}) VALUES ({', '.join('?' * len(values))})"
        row = self._db.execute(sql, list(values.values())).lastrowid
        assert row is not None
        return row

    def _show(self, conversation: int, leaf: int | None) -> None:
        self._db.execute("UPDATE conversation SET leaf = ? WHERE id = ?", [leaf, conversation])

    def _change(self, conversation: int, values: Values) -> None:
        with self._writing():
            sql = f"UPDATE conversation SET {_assignments(values)} WHERE id = ?"
            if not self._db.execute(sql, [*values.values(), conversation]).rowcount:
                self.conversation(conversation)  # raises

    def _update_answer(self, answer: int, values: Values) -> None:
        sql = f"UPDATE message SET {_assignments(values)} WHERE id = ? AND owner = ?"
        if not self._db.execute(sql, [*values.values(), answer, self._instance.name]).rowcount:
            raise StoreError(f"message {answer} is no answer under way in this instance; ask again")

    def _check_inside(self, conversation: int, message: int) -> None:
        if self.message(message).conversation != conversation:
            raise StoreError(f"message {message} is not in conversation {conversation}; choose one that is")


def _assignments(values: Values) -> str:
    return ", ".join(f"{column} = ?" for column in values)


def as_json(values: Values | None) -> str:
    return encodable(json.dumps(dict(values or {}), ensure_ascii=False, allow_nan=False))
