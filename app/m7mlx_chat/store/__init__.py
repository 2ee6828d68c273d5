"""The conversations on disk: every question and every answer, from the moment it is sent.

    with Store(path) as store:
        asked = store.ask(None, None, "What is the capital of France?", model="mistral")
        store.grow(asked.answer, "The capital")                         # at least every second
        store.finish(asked.answer, "complete", "The capital of France is Paris.", ids=[...])
        store.branch(asked.answer, limit=50)

Nothing is lost: a question is on the disk, with an empty answer, before the model sees it; an
answer is at most one `grow` behind. Whoever opens the store makes the answers of those who died
`interrupted`. Several instances of the program may use one database.

Threads: a store belongs to the thread that opened it, the app's; sqlite3 refuses any other. Its
transactions are short, but for `plant` and `fork`, which write whole conversations. Only opening
may have to wait for long.

Every method raises StoreError if what it is given is not there, and DiskError or RunError if SQLite
fails.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from types import TracebackType
from typing import Self

from filelock import FileLock, Timeout

from m7mlx.errors import RunError
from m7mlx_chat.store.conversations import ConversationWriter
from m7mlx_chat.store.errors import StoreError
from m7mlx_chat.store.instances import Instance, living
from m7mlx_chat.store.reader import tree_of
from m7mlx_chat.store.rows import (
    CHOSEN_TITLE_LENGTH,
    Asked,
    Ending,
    Head,
    Message,
    Node,
    Tree,
    encodable,
    pack,
    title_of,
)
from m7mlx_chat.store.schema import one_line, open_database
from m7mlx_chat.store.writer import Values, as_json

_OPENING_SECONDS = 30.0

_BELOW = """
    WITH RECURSIVE below (id) AS (
        SELECT :message
        UNION ALL
        SELECT m.id FROM below CROSS JOIN message m ON m.conversation = :conversation AND m.parent = below.id
            AND m.id > below.id
    )
"""


class Store(ConversationWriter):
    """The database, open for reading and writing.

    path   the database; made where there is none
    clock  seconds since 1970
    """

    def __init__(self, path: Path, *, clock: Callable[[], float] = time.time) -> None:
        self._instances = path.with_name("instances")
        with one_line(path), ExitStack() as undo:
            path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            self._opening = FileLock(path.with_name(f"{path.name}.lock"), timeout=_OPENING_SECONDS)
            with _held(self._opening, path):
                db = open_database(path)
                undo.callback(db.close)
                instance = Instance(self._instances)
                undo.callback(instance.close)
                super().__init__(path, db, instance, clock)
                self.recover()
                with suppress(StoreError):  # of a damaged conversation, which stays then
                    self._erase_deleted()
            undo.pop_all()

    def close(self) -> None:
        """Leave; an answer still under way here becomes `interrupted`, drafts go to who is next."""
        try:
            self._interrupt("owner = ?", [self._instance.name])
            self._release("owner = ?", [self._instance.name])
        finally:
            self._instance.close()
            self._db.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    # --- asking and answering ---------------------------------------------------------------------

    def ask(
        self,
        conversation: int | None,
        parent: int | None,
        text: str,
        *,
        model: str = "",
        system: str = "",
        settings: Values | None = None,
    ) -> Asked:
        """Store a question and the answer to come, which becomes the end of the branch shown.

        Without a `conversation` a new one begins. `parent` is the answer before the question, None
        for a first question; an edited question has the parent of the old one. The answer keeps
        what it is made with: `model`, `settings` and, as settings["system"], the system prompt.
        """
        now = self.clock()
        with self._writing():
            if conversation is None:
                conversation = self._add_conversation(
                    Head(
                        title=title_of(text),
                        automatic=True,
                        created=now,
                        updated=now,
                        model=model,
                        system=system,
                        settings=dict(settings or {}),
                    )
                )
            elif parent is None:
                self.conversation(conversation)  # raises if it is not there
            if parent is not None:
                self._check_inside(conversation, parent)
            question = self._add_message(conversation, Node(parent=parent, role="user", text=text, created=now))
            answer = self._add_answer(conversation, question, model, system, settings)
        return Asked(conversation, question, answer)

    def again(self, question: int, *, model: str = "", system: str = "", settings: Values | None = None) -> int:
        """Store one more answer to come to a question, as `ask` does; returns its id."""
        with self._writing():
            return self._add_answer(self._question(question).conversation, question, model, system, settings)

    def write(
        self,
        question: int,
        text: str,
        *,
        model: str = "",
        system: str = "",
        settings: Values | None = None,
        statistics: Values | None = None,
    ) -> int:
        """Store an answer that the user has written; it can be gone on with. Returns its id."""
        with self._writing():
            head = self._question(question)
            answer = self._add_answer(head.conversation, question, model, system, settings)
            written = as_json({**(statistics or {}), "written": True, "ended": self.clock()})
            values = {"status": "stopped", "owner": None, "text": encodable(text), "statistics": written}
            self._update_answer(answer, values)
        return answer

    def _question(self, message: int) -> Message:
        found = self.message(message)
        if found.role != "user":
            raise StoreError(f"message {message} is an answer; choose a question to answer again")
        return found

    def resume(self, answer: int) -> None:
        """Let an answer that has ended go on: it is under way here, with the text that it has."""
        with self._writing():
            message = self.message(answer)
            if message.role != "assistant" or message.status == "answering":
                raise StoreError(f"message {answer} cannot be gone on with; it is {message.status}")
            self._db.execute(
                "UPDATE message SET status = 'answering', owner = ? WHERE id = ?", [self._instance.name, answer]
            )
            self._show(message.conversation, answer)

    def grow(self, answer: int, text: str, statistics: Values | None = None) -> None:
        """Save all there is of an answer so far."""
        known = {} if statistics is None else {"statistics": as_json(statistics)}
        with self._writing():
            self._update_answer(answer, {"text": encodable(text), **known})

    def finish(
        self,
        answer: int,
        status: Ending,
        text: str,
        statistics: Values | None = None,
        ids: Sequence[int] | None = None,
    ) -> None:
        """Save a whole answer and how it ended."""
        values = {
            "status": status,
            "owner": None,
            "text": encodable(text),
            "statistics": as_json(statistics),
        }
        with self._writing():
            self._update_answer(answer, {**values, "ids": None if ids is None else pack(ids)})
            spoken = "UPDATE conversation SET updated = ? WHERE id = (SELECT conversation FROM message WHERE id = ?)"
            self._db.execute(spoken, [self.clock(), answer])

    def recover(self) -> None:
        """Make the answers of instances that died `interrupted`; their drafts are nobody's now."""
        with one_line(self.path), _held(self._opening, self.path):
            alive = sorted(living(self._instances))
            dead = f"owner NOT IN ({', '.join('?' * len(alive))})"
            self._interrupt(dead, alive)
            self._release(dead, alive)

    # --- branches ---------------------------------------------------------------------------------

    def switch(self, conversation: int, message: int) -> int:
        """Show the branch through a message, down to the newest below it; returns that leaf."""
        with self._writing():
            self._check_inside(conversation, message)
            # Ids only grow, and a child is newer than its parent: the newest of all below is a
            # leaf.
            (row,) = self._rows(
                f"{_BELOW} SELECT max(id) AS leaf FROM below", {"conversation": conversation, "message": message}
            )
            self._show(conversation, row["leaf"])
        return int(row["leaf"])

    def fork(self, message: int) -> int:
        """Copy the path from the root to a message into a new conversation; returns its id."""
        head = self.conversation(self.message(message).conversation)
        copy = tree_of(head, self.branch(message), message)
        now = self.clock()
        title = title_of(f"{head.title} (fork)", CHOSEN_TITLE_LENGTH)
        return self.plant([replace(copy, title=title, created=now, updated=now, archived=False, pinned=False)])[0]

    def plant(self, trees: Iterable[Tree]) -> list[int]:
        """Store whole conversations, all of them or none; returns their ids."""
        planted = []
        with self._writing():
            for tree in trees:
                conversation = self._add_conversation(tree)
                ids: list[int] = []
                for node in tree.nodes:
                    parent = None if node.parent is None else ids[node.parent]
                    ids.append(self._add_message(conversation, replace(node, parent=parent)))
                self._show(conversation, None if tree.leaf is None else ids[tree.leaf])
                planted.append(conversation)
        return planted

    # --- writing ----------------------------------------------------------------------------------

    def _add_answer(self, conversation: int, question: int, model: str, system: str, settings: Values | None) -> int:
        now = self.clock()
        made_with = {**(settings or {}), "system": system}
        node = Node(
            parent=question,
            role="assistant",
            text="",
            status="answering",
            created=now,
            model=model,
            settings=made_with,
        )
        answer = self._add_message(conversation, node)
        self._show(conversation, answer)
        self._db.execute("UPDATE conversation SET updated = ? WHERE id = ?", [now, conversation])
        return answer

    def _interrupt(self, whose: str, values: Sequence[str]) -> None:
        with self._writing():
            # OR IGNORE: a row that breaks another rule, since it is damaged, does not keep the
            # others.
            sql = "UPDATE OR IGNORE message SET status = 'interrupted', owner = NULL WHERE status = 'answering'"
            sql += f" AND (owner IS NULL OR {whose})"
            self._db.execute(sql, values)


@contextmanager
def _held(lock: FileLock, path: Path) -> Iterator[None]:
    """Let one instance at a time open a database, or look for instances that died."""
    try:
        with lock:
            yield
    except Timeout:
        raise RunError(f"another m7mlx-chat has been opening {path} for long; try again, or end it") from None


@contextmanager
def open_store(path: Path | None) -> Iterator[Store]:
    """Open a database for a while; None: an empty one that is gone afterwards."""
    if path is not None:
        with Store(path) as store:
            yield store
    else:
        with TemporaryDirectory(prefix="m7mlx-chat-") as folder, Store(Path(folder) / "chats.db") as store:
            yield store
