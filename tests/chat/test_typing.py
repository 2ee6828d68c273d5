"""What is typed goes to the composer, unless a message or the list was chosen for commands."""

from __future__ import annotations

from pathlib import Path

from chat_harness import Chat, chatting, done
from m7mlx_chat.widgets.messages import MessageView
from m7mlx_chat.widgets.sidebar import Conversations
from textual import events
from textual.widget import Widget

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
