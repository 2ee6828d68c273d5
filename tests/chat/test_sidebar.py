"""The list of conversations: order, titles, search, renaming, putting away, deleting."""

from __future__ import annotations

import time
from datetime import date
from pathlib import Path

import pytest
from chat_harness import Chat, chatting, done
from m7mlx_chat import dates
from m7mlx_chat.screens.dialogs import Ask
from m7mlx_chat.store import Store
from m7mlx_chat.widgets.messages import MessageView
from m7mlx_chat.widgets.sidebar import Conversations
from textual.widgets import Input


def listed(chat: Chat) -> list[str]:
    found = chat.app.query_one(Conversations)
    options = [found.get_option_at_index(i) for i in range(found.option_count)]
    return [str(option.prompt) for option in options if not option.disabled]


async def three(chat: Chat) -> None:
    for name in ("apples", "pears", "plums"):
        chat.session.new()
        await chat.exchange(f"About {name}", f"There is much to say about {name}.")


async def search(chat: Chat, text: str) -> None:
    await chat.pilot.press("ctrl+f")
    chat.app.query_one("#search", Input).value = text
    await chat.pilot.pause(0.3)


async def test_conversations_are_listed_and_opened(tmp_path: Path) -> None:
    async with chatting(tmp_path, size=(130, 30)) as chat:  # wide: the list is there from the start
        await three(chat)
        assert listed(chat) == ["About plums", "About pears", "About apples"]
        chat.app.query_one(Conversations).focus()
        await chat.pilot.press("down", "down", "enter")
        await chat.pilot.pause()
        assert chat.line()[0] == "About apples"
        assert chat.app.composer.has_focus
        await chat.exchange("More", "Yes.")
        assert listed(chat)[0] == "About apples"  # the last one spoken in comes first


async def test_it_opens_and_closes(tmp_path: Path) -> None:
    async with chatting(tmp_path, size=(80, 24)) as chat:
        await three(chat)
        assert not chat.app.sidebar.is_shown
        await chat.pilot.press("ctrl+b")
        assert chat.app.query_one(Conversations).has_focus
        assert listed(chat) == ["About plums", "About pears", "About apples"]
        await chat.pilot.press("ctrl+b")
        assert chat.app.composer.has_focus


async def test_a_search_finds_messages_and_jumps_to_them(tmp_path: Path) -> None:
    async with chatting(tmp_path) as chat:
        await three(chat)
        await chat.send("/retry")
        await chat.say(done("Something about quinces."))
        await search(chat, "much pears")
        assert len(listed(chat)) == 1
        assert "There is much to say about pears." in listed(chat)[0]
        await chat.pilot.press("enter", "enter")
        await chat.pilot.pause()
        assert chat.line() == ["About pears", "There is much to say about pears."]
        assert [view.text for view in chat.app.query(".-found").results(MessageView)] == [
            "There is much to say about pears."
        ]
        assert chat.app.composer.has_focus  # what is typed next is no command to the message
        await search(chat, "plums say")  # on a branch that is not the one shown last
        await chat.pilot.press("enter", "enter")
        await chat.pilot.pause()
        assert chat.line() == ["About plums", "There is much to say about plums."]
        await search(chat, 'nothing "of [the] sort* (')
        assert listed(chat) == []
        await search(chat, "")
        assert len(listed(chat)) == 3


async def test_titles_are_found_too_and_one_enter_opens_what_is_highlighted(tmp_path: Path) -> None:
    async with chatting(tmp_path) as chat:
        await three(chat)
        await chat.send("/rename Fruit of the garden")
        await chat.exchange("A garden, and more of it", "Yes.")
        await search(chat, "garden")
        assert len(listed(chat)) == 2
        assert listed(chat)[0] == "Fruit of the garden"
        assert "Titles" in chat.shown() and "Messages" in chat.shown()
        await search(chat, "say about")
        assert len(listed(chat)) == 3
        await chat.pilot.press("down", "down")
        chat.app.show_conversations()  # an answer ends somewhere, say: what is highlighted stays
        await chat.pilot.press("enter")
        await chat.pilot.pause()
        assert chat.line()[0] == "About plums"  # the third
        await search(chat, "uch to s")  # a part of words
        assert len(listed(chat)) == 3


async def test_all_conversations_can_be_reached(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("m7mlx_chat.widgets.sidebar._PAGE", 40)
    with Store(tmp_path / "chats.db") as store:
        for number in range(130):
            store.ask(None, None, f"conversation {number}")
    async with chatting(tmp_path, size=(130, 30)) as chat:
        assert len(listed(chat)) == 40
        assert "130 conversations" in chat.shown()
        chat.app.query_one(Conversations).focus()
        for _ in range(5):
            await chat.pilot.press("end")
            await chat.pilot.pause()
        assert len(listed(chat)) == 130
        await chat.pilot.press("enter")
        await chat.pilot.pause()
        assert chat.line()[0] == "conversation 0"


async def test_what_was_deleted_comes_back_after_a_restart(tmp_path: Path) -> None:
    async with chatting(tmp_path, size=(130, 30)) as chat:
        await three(chat)
        await chat.send("/delete")
    async with chatting(tmp_path, size=(130, 30)) as chat:
        chat.app.query_one(Conversations).focus()
        await chat.pilot.press("home", "d")
        assert listed(chat) == ["About apples"]
        await chat.pilot.press("t")
        assert listed(chat) == ["About pears", "About plums"]
        await chat.pilot.press("home", "down", "enter")
        await chat.pilot.pause()
        assert chat.line()[0] == "About plums"
        await chat.send("/undo")
        assert chat.line()[0] == "About pears"
        chat.app.query_one(Conversations).focus()
        await chat.pilot.press("t")
        assert listed(chat) == ["About plums", "About pears", "About apples"]


async def test_renaming(tmp_path: Path) -> None:
    async with chatting(tmp_path, size=(130, 30)) as chat:
        await three(chat)
        await chat.send("/rename A [new] title")
        assert listed(chat)[0] == "A [new] title"
        assert "A [new] title" in chat.shown().splitlines()[0]
        chat.app.query_one(Conversations).focus()
        await chat.pilot.press("down", "r")
        assert isinstance(chat.app.screen, Ask)
        field = chat.app.screen.query_one(Input)
        assert field.value == "About pears"
        field.value = "Pears"
        await chat.pilot.press("enter")
        assert listed(chat)[1] == "Pears"
        await chat.pilot.press("r", "escape")
        assert listed(chat)[1] == "Pears"
        await chat.send("/rename")
        chat.app.screen.query_one(Input).value = ""
        await chat.pilot.press("enter")
        assert listed(chat)[0] == "About plums"  # the automatic title again


async def test_putting_away_and_bringing_back(tmp_path: Path) -> None:
    async with chatting(tmp_path, size=(130, 30)) as chat:
        await three(chat)
        chat.app.query_one(Conversations).focus()
        await chat.pilot.press("down", "a")
        assert listed(chat) == ["About plums", "About apples"]
        await search(chat, "much pears")
        assert len(listed(chat)) == 1  # it is still found
        await search(chat, "")
        chat.app.query_one(Conversations).focus()
        await chat.pilot.press("v")
        assert listed(chat) == ["About pears"]
        await chat.pilot.press("home", "a", "v")
        assert listed(chat) == ["About plums", "About pears", "About apples"]
        await chat.send("/archive")
        assert listed(chat) == ["About pears", "About apples"]


async def test_deleting_and_undoing(tmp_path: Path) -> None:
    async with chatting(tmp_path, size=(130, 30)) as chat:
        await three(chat)
        chat.app.query_one(Conversations).focus()
        await chat.pilot.press("down", "d")
        await chat.send("/delete")
        assert listed(chat) == ["About apples"]
        assert chat.session.line == []
        await chat.send("/undo")
        assert chat.line()[0] == "About plums"
        chat.app.query_one(Conversations).focus()
        await chat.pilot.press("u")
        assert sorted(listed(chat)) == ["About apples", "About pears", "About plums"]
        await chat.send("/undo")
        assert any("nothing has been deleted" in n.message for n in chat.app._notifications)
        await chat.send("go on")
        await chat.send("/delete")
        assert any("being answered" in n.message for n in chat.app._notifications)
        assert len(listed(chat)) == 3


async def test_what_another_window_says_appears(tmp_path: Path) -> None:
    async with chatting(tmp_path, size=(130, 30)) as chat:
        await three(chat)
        chat.app.look_around()
        with Store(tmp_path / "chats.db") as other:
            asked = other.ask(None, None, "From the other window")
            chat.app.look_around()
            assert listed(chat)[0] == "From the other window"
            await chat.app.open_conversation(asked.conversation)
            assert chat.footers()[-1] == "being answered in another window"
            assert chat.app.state == "ready"


def test_headings(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dates, "today", lambda: date(2026, 3, 10))

    def when(day: date) -> str:
        return dates.group_of(time.mktime(day.timetuple()) + 3600)

    assert when(date(2026, 3, 10)) == "Today"
    assert when(date(2026, 3, 11)) == "Today"  # a clock that was wrong
    assert when(date(2026, 3, 9)) == "Yesterday"
    assert when(date(2026, 3, 4)) == "This week"
    assert when(date(2026, 2, 20)) == "This month"
    assert when(date(2025, 12, 1)) == "2025"
