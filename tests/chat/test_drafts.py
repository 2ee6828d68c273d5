"""Nothing typed is lost: each conversation's draft is on the disk, whatever the user does next."""

from __future__ import annotations

import sqlite3
from contextlib import closing
from pathlib import Path

import pytest
from chat_harness import Chat, chatting
from m7mlx_chat.store import Store
from m7mlx_chat.store.drafts import Place
from m7mlx_chat.store.schema import MIGRATIONS, open_database
from textual import events

LONG = "a line of it\n" * 60


def draft(chat: Chat) -> str:
    return chat.app.composer.unsent.message()


async def quits(chat: Chat) -> None:
    await chat.pilot.press("ctrl+q")
    await chat.pilot.pause()
    assert not chat.app.is_running


async def test_each_conversation_has_its_draft(tmp_path: Path) -> None:
    async with chatting(tmp_path) as chat:
        await chat.exchange("first", "yes")
        first = chat.session.conversation or 0
        await chat.pilot.press(*"one")
        await chat.pilot.press("ctrl+n")
        assert draft(chat) == ""
        chat.app.post_message(events.Paste(LONG))
        await chat.pilot.pause()
        await chat.app.open_conversation(first)
        assert draft(chat) == "one"
        await chat.pilot.press("ctrl+n")
        assert draft(chat) == LONG.strip()
        await chat.pilot.press("enter")
        await chat.pilot.pause()
        assert chat.line()[0] == LONG.strip()
        await chat.pilot.press(*"more", "escape")  # while it is answered
        await chat.app.open_conversation(first)
        assert draft(chat) == "one"
        await quits(chat)
    async with chatting(tmp_path) as chat:
        assert draft(chat) == ""  # that of a new conversation has been sent
        await chat.app.open_conversation(first)
        assert draft(chat) == "one"
        await chat.pilot.press("ctrl+n", *"new")
        chat.app.drafts.keep()  # on a timer
        with Store(tmp_path / "chats.db") as other:
            assert other.draft(Place()) == ("new", {})
            assert [hit.snippet for hit in other.search("new")] == []


async def test_escape_in_an_edit_brings_back_what_was_there_and_loses_neither(tmp_path: Path) -> None:
    async with chatting(tmp_path) as chat:
        await chat.exchange("question", "answer")
        await chat.pilot.press(*"mine", "alt+up", "alt+up", "e")
        assert draft(chat) == "question"
        await chat.pilot.press("!", "escape")
        assert draft(chat) == "mine"
        await chat.pilot.press("alt+up", "alt+up", "e")
        assert draft(chat) == "question!"
        await chat.pilot.press("?")
        await quits(chat)
    async with chatting(tmp_path) as chat:
        await chat.app.open_conversation(1)
        assert draft(chat) == "question!?"
        assert "editing" in str(chat.app.composer.border_title)
        await chat.pilot.press("enter")
        await chat.pilot.pause()
        assert chat.line()[0] == "question!?"
        assert draft(chat) == "mine"
        await chat.pilot.press("escape", "alt+up", "alt+up", "r")  # sends nothing of it
        assert draft(chat) == "mine"


async def test_what_is_cleared_comes_back(tmp_path: Path) -> None:
    async with chatting(tmp_path) as chat:
        await chat.exchange("asked before", "yes")
        chat.app.post_message(events.Paste(LONG))
        await chat.pilot.pause()
        await chat.pilot.press("!", "ctrl+c")
        assert draft(chat) == ""
        await chat.pilot.press("ctrl+z")
        assert draft(chat) == LONG + "!"
        await chat.pilot.press("ctrl+c", "ctrl+c", "ctrl+c")
        await chat.pilot.pause()
        assert not chat.app.is_running
    async with chatting(tmp_path) as chat:
        await chat.pilot.press("up")
        assert draft(chat) == LONG + "!"
        await chat.pilot.press("up", "up")
        assert draft(chat) == "asked before"
        await chat.pilot.press("ctrl+z")
        assert draft(chat) == LONG + "!"


async def test_a_command_that_fails_stays_where_it_was_typed(tmp_path: Path) -> None:
    async with chatting(tmp_path) as chat:
        for line in ("/set temperature hot", "/theme no-such", "/import no-such", "/continue", "/export"):
            await chat.send(line)
            assert draft(chat) == line
            chat.app.composer.reset()


async def test_a_disk_that_is_full_keeps_a_draft_for_later(tmp_path: Path) -> None:
    async with chatting(tmp_path) as chat:
        await chat.exchange("question", "answer")
        await chat.pilot.press(*"draft")
        chat.store._db.execute("PRAGMA query_only = 1")
        await chat.pilot.press("!", "ctrl+n", *"new")
        chat.app.drafts.keep()  # on a timer
        assert "cannot be written" in chat.notices()
        await chat.app.open_conversation(1)
        assert draft(chat) == "draft!"
        chat.store._db.execute("PRAGMA query_only = 0")
        await quits(chat)
        assert chat.store.draft(Place(1)) == ("draft!", {})
        assert chat.store.draft(Place()) == ("new", {})


async def test_two_windows_of_a_conversation_lose_neither_text(tmp_path: Path) -> None:
    """Each keeps its own; who comes begins with the newest; what was left is gone on with."""
    async with chatting(tmp_path) as one:
        await one.exchange("question", "answer")
        await one.pilot.press(*"one")
        one.app.drafts.keep()
        async with chatting(tmp_path) as two:
            await two.app.open_conversation(1)
            assert draft(two) == "one"
            await two.pilot.press(*" two")
            two.app.drafts.keep()
            await one.pilot.press("!")
            one.app.drafts.keep()
            for chat, text in ((one, "one!"), (two, "one two")):
                assert chat.store.draft(Place(1)) == (text, {})
            await two.pilot.press("ctrl+n")
            await two.app.open_conversation(1)
            assert draft(two) == "one two"
            await quits(two)
        await one.pilot.press("enter")
        await one.pilot.pause()
        assert one.line()[2] == "one!"
        await quits(one)
    async with chatting(tmp_path) as chat:
        await chat.app.open_conversation(1)
        assert draft(chat) == "one two"
        chat.app.composer.focus()
        await chat.pilot.press("enter")
        await chat.pilot.pause()
        assert chat.line()[4] == "one two"
        assert chat.store.draft(Place(1)) is None


async def test_what_is_cleared_in_one_window_comes_back_in_that(tmp_path: Path) -> None:
    async with chatting(tmp_path) as one, chatting(tmp_path) as two:
        for chat, text in ((one, "first"), (two, "second")):
            await chat.pilot.press(*text, "ctrl+c")
        for chat, text in ((one, "first"), (two, "second")):
            chat.app.composer.focus()
            await chat.pilot.press("up")
            assert draft(chat) == text


def test_drafts_of_a_window_that_was_killed_are_found(tmp_path: Path) -> None:
    path = tmp_path / "chats.db"
    with Store(path) as store:
        store.keep_draft(Place(), "mine", {})
    with Store(path) as store:
        store._db.execute("UPDATE draft SET owner = 'an instance that is dead'")
        assert store.draft(Place()) == ("mine", {})
        store.drop_draft(Place())
        assert store.draft(Place()) == ("mine", {})  # it may live, for all that this one knows
    with Store(path) as store:
        assert store.draft(Place()) == ("mine", {})
        store.drop_draft(Place())
        assert store.draft(Place()) is None


def test_drafts_of_older_databases_are_kept(tmp_path: Path) -> None:
    path = tmp_path / "chats.db"
    with closing(open_database(path, MIGRATIONS[:3])) as db:
        db.execute("INSERT INTO draft VALUES ('new', NULL, 5, 'old', '{\"a\": \"b\"}')")
    with Store(path) as store:
        assert store.draft(Place()) == ("old", {"a": "b"})


def test_a_damaged_draft_is_a_text(tmp_path: Path) -> None:
    path = tmp_path / "chats.db"
    with Store(path) as store:
        asked = store.ask(None, None, "question")
        store.keep_draft(Place(asked.conversation, asked.question), "edited", {})
        store.keep_draft(Place(), "a\ud800", {"a": "b"})
    with sqlite3.connect(path) as db:
        db.execute("UPDATE draft SET pastes = '[nonsense', place = 'question x' WHERE conversation = 1")
        db.execute("UPDATE draft SET shown = x'ff00' WHERE conversation IS NULL")
    with Store(path) as store:
        assert store.last_place(1) == Place(1)
        assert store.draft(Place()) == ("\ufffd\0", {"a": "b"})
        store.delete(1)
    with Store(path, clock=lambda: 4e9) as store:  # erased, and its drafts with it
        with pytest.raises(Exception, match="refused"):
            store.keep_draft(Place(1), "x", {})
        assert store._db.execute("SELECT count(*) FROM draft").fetchone()[0] == 1
