"""What is typed goes to the composer, unless a message or the list was chosen for commands."""

from __future__ import annotations

from pathlib import Path

import pytest
from chat_harness import Chat, chatting, done
from m7mlx_chat.widgets.messages import MessageView
from m7mlx_chat.widgets.sidebar import Conversations
from textual import events
from textual.widget import Widget
from textual.widgets import Input

LETTERS = "creftyduav[]x"  # every letter that is a command somewhere


def hints(chat: Chat) -> str:
    return str(chat.app.query_one("#hints").content)  # type: ignore[attr-defined]


async def two_versions(chat: Chat) -> None:
    await chat.exchange("question", "first")
    await chat.send("/retry")
    await chat.say(done("second"))


async def test_text_typed_after_a_click_is_a_message(tmp_path: Path) -> None:
    async with chatting(tmp_path, size=(130, 30)) as chat:
        await two_versions(chat)
        await chat.exchange("another", "answer")
        asked, line = len(chat.engine.asked), chat.line()
        listed = chat.app.query_one(Conversations)
        places: list[tuple[type[Widget] | str, tuple[int, int]]] = [
            (MessageView, (20, 0)),
            (Conversations, (5, 0)),  # a heading
            (Conversations, (5, 15)),  # below the list
            ("#top", (5, 0)),
            ("#status", (5, 0)),
            ("#chat", (5, 20)),
        ]
        for place, offset in places:
            await chat.pilot.click(place, offset=offset)
            await chat.pilot.press(*LETTERS)
            await chat.pilot.pause()
            assert chat.app.composer.text == LETTERS, place
            assert chat.app.selected is None and not listed.has_focus
            chat.app.composer.reset()
        assert (len(chat.engine.asked), chat.line()) == (asked, line)
        assert len(chat.store.conversations()) == 1
        chat.app.set_focus(None)
        chat.app.post_message(events.Paste("pasted"))
        await chat.pilot.pause()
        await chat.pilot.press("x")
        assert chat.app.composer.text == "pastedx"


async def test_a_click_on_another_version_selects_nothing(tmp_path: Path) -> None:
    async with chatting(tmp_path) as chat:
        await two_versions(chat)
        await chat.pilot.click(".versions", offset=(1, 0))
        await chat.pilot.pause()
        assert chat.line()[-1] == "first"
        await chat.pilot.press(*"free")
        assert chat.app.composer.text == "free"
        assert len(chat.engine.asked) == 2


async def test_the_bar_and_alt_up_select_and_the_hint_line_says_so(tmp_path: Path) -> None:
    async with chatting(tmp_path) as chat:
        await two_versions(chat)
        assert "F1 help" in hints(chat)
        view = chat.app.transcript.views[-1]
        await chat.pilot.click(offset=(view.region.x, view.region.y))
        await chat.pilot.pause()
        assert view.has_focus
        assert "c copy" in hints(chat) and "Esc back" in hints(chat)
        await chat.pilot.press("f")
        await chat.pilot.pause()
        assert len(chat.store.conversations()) == 2  # the command was obeyed
        assert "F1 help" in hints(chat)
        await chat.pilot.press("alt+up")
        await chat.pilot.pause()
        assert "c copy" in hints(chat)
        await chat.pilot.press("x", "r")  # no command: from here on it is a message
        assert chat.app.composer.text == "xr"
        assert chat.app.selected is None
        await chat.pilot.press("tab", "tab", "tab")  # no message is reached by Tab
        assert chat.app.selected is None


async def test_the_list_has_its_keys_where_they_were_asked_for(tmp_path: Path) -> None:
    async with chatting(tmp_path, size=(100, 30)) as chat:
        await two_versions(chat)
        await chat.pilot.press("ctrl+b")
        await chat.pilot.pause()
        assert "d delete" in hints(chat)
        await chat.pilot.press("x", "d")
        assert chat.app.composer.text == "xd"
        assert len(chat.store.conversations()) == 1
        await chat.pilot.press("ctrl+b", "ctrl+b", "d")
        assert chat.store.conversations() == []


async def press_ahead(chat: Chat, key: str, text: str) -> None:
    """Press a key and type a text before the app takes notice of either, as when it is busy."""
    for one in (key, *text):
        event = events.Key(one, one if len(one) == 1 else None)
        event.set_sender(chat.app)
        chat.app.post_message(event)
    await chat.pilot.pause()
    await chat.pilot.pause()


async def test_what_is_typed_ahead_goes_where_the_key_before_leads(tmp_path: Path) -> None:
    async with chatting(tmp_path, size=(100, 30)) as chat:
        await chat.exchange("question", "answer")
        field = chat.app.query_one("#search", Input)
        await press_ahead(chat, "ctrl+f", "abc")
        assert (field.value, chat.app.composer.text) == ("abc", "")
        await press_ahead(chat, "ctrl+n", "def")
        assert (field.value, chat.app.composer.text) == ("abc", "def")
        await press_ahead(chat, "ctrl+b", "")  # hides the list
        await press_ahead(chat, "ctrl+b", "v")  # shows it: v lists what was put away
        assert (chat.app.sidebar.shelf, chat.app.composer.text) == ("put away", "def")
        await press_ahead(chat, "escape", "gh")
        assert chat.app.composer.text == "defgh"


@pytest.mark.parametrize("key", ["ctrl+o", "ctrl+r"])
async def test_what_is_typed_ahead_goes_to_the_screen_that_a_key_opens(tmp_path: Path, key: str) -> None:
    async with chatting(tmp_path) as chat:
        await press_ahead(chat, key, "abc")
        assert (chat.app.screen.query_one(Input).value, chat.app.composer.text) == ("abc", "")
        await press_ahead(chat, "escape", "def")
        assert chat.app.composer.text == "def"


async def test_a_key_for_a_message_may_be_pressed_right_after_the_one_that_selects_it(tmp_path: Path) -> None:
    async with chatting(tmp_path) as chat:
        await chat.exchange("question", "answer")
        await press_ahead(chat, "alt+up", "r")
        assert (len(chat.engine.asked), chat.app.composer.text) == (2, "")
