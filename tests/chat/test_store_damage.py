"""A damaged database: the chat opens, shows what it can, tells the damage, loses nothing."""

from __future__ import annotations

import shutil
import sqlite3
from collections.abc import Iterator, Mapping
from contextlib import closing, suppress
from itertools import zip_longest
from pathlib import Path

import pytest
from chat_harness import Chat, chatting, done
from effort import some
from m7mlx_chat.portable import to_json
from m7mlx_chat.portable.page import to_html, to_markdown
from m7mlx_chat.store import Store

from m7mlx.errors import M7Error

# Values that a column never has. Those of different columns do not hide each other: one walk
# through the chat can meet several.
MESSAGE: dict[str, tuple[str, ...]] = {
    "settings": ("'{'", "'[1]'", "NULL", "x'ff00'"),
    "statistics": (
        "'null'",
        """'{"generated_tokens": "many", "generation_tps": [], "peak_memory": NaN}'""",
        """'{"generated_tokens": 1e400, "error": 5, "vocabulary": {}}'""",
        "replace(hex(zeroblob(50000)), '0', '[')",
    ),
    "text": (
        "NULL",
        "5",
        "x'fffe41'",
        "CAST(x'41ff42' AS TEXT)",
        "char(0, 27, 55296, 1114111)",
        "replace(hex(zeroblob(300000)), '00', 'word ')",
    ),
    "created": ("'yesterday'", "1e300", "-1e300", "9e999"),
    "model": ("NULL", "replace(hex(zeroblob(100000)), '00', 'x')"),
    "ids": ("x'00'", "'text'", "7"),
}
CONVERSATION: dict[str, tuple[str, ...]] = {
    "title": (
        "NULL",
        "x'ff'",
        "CAST(x'ff41' AS TEXT)",
        "replace(hex(zeroblob(1000000)), '00', 'title ')",
    ),
    "created": ("'x'",),
    "updated": ("'y'", "1e300", "-5"),
    "archived": ("'x'",),
    "automatic": ("2.5",),
    "model": ("5", "x'00'"),
    "system": ("NULL", "x'ff'"),
    "settings": ("'7'", """'{"temperature": {}, "stop": 5, "seed": 1e99}'""", "NULL"),
}
# Damage to what belongs together, each by itself.
STRUCTURE = (
    "UPDATE message SET role = 'system'",
    "UPDATE message SET role = x'00'",
    "UPDATE message SET role = NULL",
    "UPDATE message SET status = 'odd'",
    "UPDATE message SET status = 'answering', owner = NULL",
    "UPDATE message SET status = 'answering', owner = 5, role = 'odd'",
    "UPDATE message SET parent = id",
    "UPDATE message SET parent = 9999",
    "UPDATE message SET parent = 'x'",
    "UPDATE message SET parent = id + 1",  # goes round, with the next
    "UPDATE message SET parent = 1 WHERE id = 1",
    "UPDATE message SET parent = CASE id WHEN 1 THEN 4 ELSE id - 1 END",
    "UPDATE message SET conversation = 9999 WHERE id > 2",
    "UPDATE message SET parent = NULL",
    "UPDATE conversation SET leaf = 9999",
    "UPDATE conversation SET leaf = NULL",
    "UPDATE conversation SET leaf = 'x'",
    "UPDATE conversation SET leaf = 1",
    "UPDATE conversation SET deleted_at = 'x' WHERE id = 2",
    "DELETE FROM message WHERE id = 2",
    "DELETE FROM message",
    "DELETE FROM conversation",
    "DELETE FROM message_words_data WHERE id > 9",
    "DELETE FROM message_words_data",
    "DELETE FROM message_parts_data WHERE id > 9",
    "DELETE FROM message_parts_data",
)


def updates(table: str, columns: Mapping[str, tuple[str, ...]]) -> Iterator[list[str]]:
    """For each column the statements that spoil it."""
    for column, values in columns.items():
        yield [f"UPDATE {table} SET {column} = {value}" for value in values]


COLUMNS = [*updates("message", MESSAGE), *updates("conversation", CONVERSATION)]
EACH = [statement for statements in COLUMNS for statement in statements] + list(STRUCTURE)
TOGETHER = [[s for s in group if s] for group in zip_longest(*COLUMNS)]
TOGETHER += [[s] for s in some(STRUCTURE, 3)]  # the store itself is given all of them


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A database with a conversation of two turns."""
    path = tmp_path_factory.mktemp("sound") / "chats.db"
    with Store(path) as store:
        leaf = conversation = None
        for place in ("first", "second"):
            asked = store.ask(conversation, leaf, f"{place} question", model="m")
            conversation, leaf = asked.conversation, asked.answer
            store.finish(leaf, "complete", f"{place} answer", {"generated_tokens": 2}, [1, 2])
    return path


@pytest.fixture
def path(tmp_path: Path, sound: Path) -> Path:
    """A copy of it, to be damaged."""
    return Path(shutil.copy(sound, tmp_path))


def damage(path: Path, *statements: str) -> None:
    """Damage a database as a tool would that knows nothing of the rules."""
    with closing(sqlite3.connect(path, isolation_level=None)) as db:
        for rule in ("ignore_check_constraints = ON", "foreign_keys = OFF", "writable_schema = ON"):
            db.execute(f"PRAGMA {rule}")
        # NOT NULL is the one rule that cannot be switched off.
        for kind in ("TEXT", "REAL", "INTEGER"):
            db.execute(
                f"UPDATE sqlite_schema SET sql = replace(sql, '{kind} NOT NULL', '{kind}') WHERE type = 'table'"
            )
        db.execute("PRAGMA schema_version = 99")
    with closing(sqlite3.connect(path, isolation_level=None)) as db:
        db.execute("PRAGMA ignore_check_constraints = ON")
        db.execute("DROP TRIGGER message_changed")
        db.execute("DROP TRIGGER message_removed")
        for statement in statements:
            db.execute(statement)


def contents(path: Path) -> list[tuple[object, ...]]:
    with closing(sqlite3.connect(path)) as db:
        db.text_factory = bytes
        return [tuple(row) for table in ("message", "conversation") for row in db.execute(f"SELECT * FROM {table}")]


async def use(chat: Chat) -> None:
    """A walk through all that reads."""
    app, press = chat.app, chat.pilot.press
    with app.going_on():
        await app.open_conversation(1)
    for line in ("/stats", "/copy all", "/retry", "/replay", "/continue", "/edit"):
        with app.going_on():
            await app.run_command(line)
        await chat.pilot.pause()
        await press("escape")
        if chat.session.under_way is not None:
            await chat.say(done("once more"))
        await press("escape")
    await press("alt+up", "right_square_bracket", "escape", "ctrl+r", "escape")
    await press("ctrl+f", "q", "enter", "enter", "escape")
    await chat.pilot.pause()
    if chat.session.under_way is not None:  # with no message to choose, a letter was a question
        await chat.say(done("once more"))


def read_everything(store: Store) -> None:
    """Call all that reads; it may fail in one line."""
    with suppress(M7Error):
        heads = [*store.conversations(), *store.conversations(archived=True)]
        for head in [*heads, *map(store.conversation, (1, 2))]:
            line = store.shown(head)
            branch = store.branch(line[-1]) if line else []
            assert [message.ids for message in branch] == [message.ids for message in store.read(line)]
            for message in branch:
                assert message.id in [version.id for version in store.siblings(message.id)]
            for text in (to_html(head, branch), to_markdown(head, branch), to_json(store.tree(head.id))):
                assert text
    for call in (store.prompts, lambda: store.search("question")):
        with suppress(M7Error):
            call()


@pytest.mark.parametrize("statement", EACH, ids=lambda statement: statement[:60])
def test_damaged_rows_are_read_and_stay_as_they_are(path: Path, statement: str) -> None:
    damage(path, statement)
    before = contents(path)
    with Store(path) as store:
        read_everything(store)
    if "owner" not in statement:  # those of dead instances are marked as such
        assert contents(path) == before


@pytest.mark.parametrize("statements", TOGETHER, ids=lambda statements: statements[0][:60])
async def test_damaged_rows(path: Path, statements: list[str]) -> None:
    damage(path, *statements)
    before = contents(path)
    async with chatting(path.parent, size=(60, 16)) as chat:
        await chat.pilot.pause()
        with Store(path) as other:
            assert other.path == path
        assert chat.app.is_running
        if "owner" not in statements[0]:  # those of dead instances are marked as such
            assert contents(path) == before
        await use(chat)
        assert chat.app.return_code is None
        assert len(chat.app.screen_stack) == 1
        if not statements[0].startswith("DELETE"):
            # nothing is lost
            assert chat.store._rows("SELECT count(*) FROM message", [])[0][0] >= 4
        with chat.app.going_on():
            chat.session.new()
            chat.app.composer.reset()
            await chat.exchange("and new ones", "are answered")
        if "message_words" not in statements[0] and "message_parts" not in statements[0]:
            assert chat.line() == ["and new ones", "are answered"]


async def test_what_is_damaged_is_told_once(path: Path) -> None:
    damage(path, "UPDATE message SET statistics = '{' WHERE id = 4")
    async with chatting(path.parent) as chat:
        await chat.app.open_conversation(1)
        await chat.app.open_conversation(1)
        await chat.pilot.pause()
        told = f"{chat.store.path} is damaged: message 4. What can be read is shown"
        assert chat.notices().splitlines() == [told]
        assert chat.line()[-1] == "second answer"


async def test_a_branch_whose_end_is_gone_is_shown_to_its_newest_message(path: Path) -> None:
    damage(path, "UPDATE conversation SET leaf = 9999")
    async with chatting(path.parent) as chat:
        await chat.app.open_conversation(1)
        assert chat.line() == ["first question", "first answer", "second question", "second answer"]
