"""A database that is damaged: the chat opens, shows what it can, says what is damaged, and loses nothing."""

from __future__ import annotations

import sqlite3
from contextlib import closing
from pathlib import Path

import pytest
from chat_harness import Chat, chatting, done
from m7mlx_chat.store import Store

DAMAGE = (
    "UPDATE message SET settings = '{'",
    "UPDATE message SET settings = '[1]'",
    "UPDATE message SET settings = NULL",
    "UPDATE message SET settings = x'ff00'",
    "UPDATE message SET statistics = 'null'",
    'UPDATE message SET statistics = \'{"generated_tokens": "many", "generation_tps": [], "peak_memory": NaN}\'',
    'UPDATE message SET statistics = \'{"generated_tokens": 1e400, "error": 5, "vocabulary": {}}\'',
    "UPDATE message SET statistics = replace(hex(zeroblob(50000)), '0', '[')",
    "UPDATE message SET text = NULL",
    "UPDATE message SET text = 5",
    "UPDATE message SET text = x'fffe41'",
    "UPDATE message SET text = CAST(x'41ff42' AS TEXT)",
    "UPDATE message SET text = char(0, 27, 55296, 1114111)",
    "UPDATE message SET text = replace(hex(zeroblob(3000000)), '00', 'word ')",
    "UPDATE message SET role = 'system'",
    "UPDATE message SET role = x'00'",
    "UPDATE message SET role = NULL",
    "UPDATE message SET status = 'odd'",
    "UPDATE message SET status = 'answering', owner = NULL",
    "UPDATE message SET status = 'answering', owner = 5, role = 'odd'",
    "UPDATE message SET created = 'yesterday'",
    "UPDATE message SET created = 1e300",
    "UPDATE message SET created = -1e300",
    "UPDATE message SET created = 9e999",
    "UPDATE message SET model = NULL",
    "UPDATE message SET model = replace(hex(zeroblob(100000)), '00', 'x')",
    "UPDATE message SET ids = x'00'",
    "UPDATE message SET ids = 'text'",
    "UPDATE message SET ids = 7",
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
    "UPDATE conversation SET title = NULL",
    "UPDATE conversation SET title = x'ff'",
    "UPDATE conversation SET title = CAST(x'ff41' AS TEXT)",
    "UPDATE conversation SET title = replace(hex(zeroblob(1000000)), '00', 'title ')",
    "UPDATE conversation SET created = 'x', updated = 'y'",
    "UPDATE conversation SET updated = 1e300",
    "UPDATE conversation SET updated = -5",
    "UPDATE conversation SET archived = 'x'",
    "UPDATE conversation SET automatic = 2.5",
    "UPDATE conversation SET deleted_at = 'x' WHERE id = 2",
    "UPDATE conversation SET model = 5",
    "UPDATE conversation SET model = x'00'",
    "UPDATE conversation SET system = NULL",
    "UPDATE conversation SET system = x'ff'",
    "UPDATE conversation SET settings = '7'",
    'UPDATE conversation SET settings = \'{"temperature": {}, "stop": 5, "seed": 1e99}\'',
    "UPDATE conversation SET settings = NULL",
    "DELETE FROM message WHERE id = 2",
    "DELETE FROM message",
    "DELETE FROM conversation",
    "DELETE FROM message_words_data WHERE id > 9",
    "DELETE FROM message_words_data",
)


def a_conversation(folder: Path) -> None:
    with Store(folder / "chats.db") as store:
        leaf = conversation = None
        for place in ("first", "second"):
            asked = store.ask(conversation, leaf, f"{place} question", model="m")
            conversation, leaf = asked.conversation, asked.answer
            store.finish(leaf, "complete", f"{place} answer", {"generated_tokens": 2}, [1, 2])


def damage(path: Path, statement: str) -> None:
    """As a tool would that knows nothing of the rules."""
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


@pytest.mark.parametrize("statement", DAMAGE, ids=lambda statement: statement[:60])
async def test_damaged_rows(tmp_path: Path, statement: str) -> None:
    a_conversation(tmp_path)
    path = tmp_path / "chats.db"
    damage(path, statement)
    before = contents(path)
    async with chatting(tmp_path) as chat:
        await chat.pilot.pause()
        with Store(path) as other:
            assert other.path == path
        assert chat.app.is_running
        if "owner" not in statement:  # those of dead instances are marked as such
            assert contents(path) == before
        await use(chat)
        assert chat.app.return_code is None
        assert len(chat.app.screen_stack) == 1
        if not statement.startswith("DELETE"):
            assert chat.store._rows("SELECT count(*) FROM message", [])[0][0] >= 4  # nothing is lost
        with chat.app.going_on():
            chat.session.new()
            chat.app.composer.reset()
            await chat.exchange("and new ones", "are answered")
        if "message_words" not in statement:
            assert chat.line() == ["and new ones", "are answered"]


async def test_what_is_damaged_is_told_once(tmp_path: Path) -> None:
    a_conversation(tmp_path)
    damage(tmp_path / "chats.db", "UPDATE message SET statistics = '{' WHERE id = 4")
    async with chatting(tmp_path) as chat:
        await chat.app.open_conversation(1)
        await chat.app.open_conversation(1)
        await chat.pilot.pause()
        told = f"{chat.store.path} is damaged: message 4. What can be read is shown"
        assert chat.notices().splitlines() == [told]
        assert chat.line()[-1] == "second answer"


async def test_a_branch_whose_end_is_gone_is_shown_to_its_newest_message(tmp_path: Path) -> None:
    a_conversation(tmp_path)
    damage(tmp_path / "chats.db", "UPDATE conversation SET leaf = 9999")
    async with chatting(tmp_path) as chat:
        await chat.app.open_conversation(1)
        assert chat.line() == ["first question", "first answer", "second question", "second answer"]
