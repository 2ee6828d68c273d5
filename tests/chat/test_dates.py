"""When something was said: beside messages, in the list, in files and in lines."""

from __future__ import annotations

from datetime import date, datetime
from pathlib import Path

import pytest
from chat_harness import Chat, chatting, done
from m7mlx_chat import dates
from m7mlx_chat.portable.page import to_html
from m7mlx_chat.store.rows import Message
from m7mlx_chat.widgets.message_parts import When
from m7mlx_chat.widgets.sidebar import Conversations

NOW = datetime(2026, 3, 10, 14, 2, 30)


@pytest.fixture(autouse=True)
def _today(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dates, "today", NOW.date)


class Clock:
    """A clock that a test puts forward."""

    def __init__(self) -> None:
        self.now = NOW.timestamp()

    def __call__(self) -> float:
        return self.now


def whens(chat: Chat) -> list[str]:
    """The times that are in sight."""
    return [str(when.content) for when in chat.app.query(When) if when.display]


def test_short_and_full() -> None:
    def short(*when: int) -> str:
        return dates.short_time(datetime(*when).timestamp())  # type: ignore[arg-type]

    assert short(2026, 3, 10, 9, 5) == "09:05"
    assert short(2026, 3, 9, 23, 59) == "yesterday"
    assert short(2026, 3, 8, 12) == "8 Mar"
    assert short(2025, 12, 31, 12) == "31 Dec 2025"
    assert short(2026, 3, 11, 12) == "11 Mar"  # a clock that was wrong
    assert dates.short_time(0) == dates.full_time(0) == dates.exact_time(0) == ""
    assert dates.full_time(NOW.timestamp()) == "2026-03-10 14:02"
    assert datetime.fromisoformat(dates.exact_time(NOW.timestamp())).timestamp() == NOW.timestamp()


@pytest.mark.parametrize("ended", ["x", -1, 1e300, float("nan"), None, True])
def test_what_a_stranger_says_of_the_end_is_checked(ended: object) -> None:
    message = Message(
        parent=None,
        role="assistant",
        text="",
        created=5.0,
        statistics={"ended": ended},
        id=1,
        conversation=1,
        place=1,
        siblings=1,
    )
    assert message.said_at == 5.0


async def test_messages_tell_when_they_were_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock()
    async with chatting(tmp_path, clock=clock) as chat:
        await chat.send("What is it?")
        assert whens(chat) == ["14:02"]  # the answer is still to come
        clock.now += 120
        await chat.say(done("An answer."))
        assert whens(chat) == ["14:02", "14:04"]
        assert chat.footers()[-1] == "2 tokens · 21.5 tok/s · first after 0.30 s"
        await chat.pilot.press("alt+up")
        assert whens(chat) == ["14:02", "2026-03-10 14:04"]  # in full, where a message is selected
        await chat.pilot.press("escape")
        assert whens(chat) == ["14:02", "14:04"]
        assert [str(when.tooltip) for when in chat.app.query(When)] == ["2026-03-10 14:02", "2026-03-10 14:04"]
        monkeypatch.setattr(dates, "today", lambda: date(2026, 3, 11))
        chat.app.look_around()  # midnight has passed
        assert whens(chat) == ["yesterday", "yesterday"]
        await chat.send("/retry")
        clock.now = datetime(2026, 3, 11, 8).timestamp()
        await chat.say(done("Another one."))
        assert whens(chat) == ["yesterday", "08:00"]


async def test_there_is_no_time_where_there_is_no_room(tmp_path: Path) -> None:
    async with chatting(tmp_path, size=(40, 20), clock=NOW.timestamp) as chat:
        await chat.exchange("What is it?", "An answer.")
        await chat.pilot.pause()
        assert "14:02" not in chat.shown()
        await chat.pilot.press("alt+up")
        await chat.pilot.pause()
        assert "▌  2 tokens · 21.5 tok/s · first\n  ▌  after 0.30 s\n  ▌  2026-03-10 14:02\n" in chat.shown()
        await chat.pilot.press("alt+up")
        await chat.pilot.pause()
        assert "▌  2026-03-10 14:02\n  ▌  What is it?\n" in chat.shown()


async def test_the_list_tells_when_the_chosen_conversation_was_spoken_in(tmp_path: Path) -> None:
    async with chatting(tmp_path, size=(130, 30), clock=NOW.timestamp) as chat:
        await chat.exchange("What is it?", "An answer.")
        assert "1 conversation · F1: keys" in chat.shown()
        chat.app.query_one(Conversations).focus()
        await chat.pilot.press("home")
        await chat.pilot.pause()
        assert "2 messages · 2026-03-10 14:02" in chat.shown()
        chat.app.composer.focus()
        await chat.pilot.pause()
        assert "1 conversation · F1: keys" in chat.shown()
        chat.app.action_find("answer")
        chat.app.sidebar.refresh_list()  # now, not after a pause in typing
        await chat.pilot.pause()
        assert "model, 14:02: An answer." in " ".join(chat.shown().split())


async def test_pages_tell_when_each_message_was_said(tmp_path: Path) -> None:
    async with chatting(tmp_path, clock=NOW.timestamp) as chat:
        await chat.exchange("What is it?", "An answer.")
        html = to_html(chat.store.conversation(1), chat.session.branch)
        assert html.count(f'<time datetime="{dates.exact_time(NOW.timestamp())}">2026-03-10 14:02</time>') == 2
