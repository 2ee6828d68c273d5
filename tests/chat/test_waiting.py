"""Before sending and while waiting: what a message costs, and that it has its turn."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest
from chat_harness import READY, Chat, chatting, done
from m7mlx_chat.events import Failed, OnDisk, Prefill, Text
from m7mlx_chat.pace import Pace, about
from m7mlx_chat.store.errors import StoreError
from m7mlx_chat.unsent import UnsentText, joined
from m7mlx_chat.widgets.messages import Answer
from m7mlx_chat.widgets.waiting import Waiting


def waiting(chat: Chat) -> str:
    widget = chat.app.screen_stack[0].query_one(Waiting)
    return str(widget.content) if widget.display else ""


async def test_what_is_sent_during_an_answer_has_its_turn(tmp_path: Path) -> None:
    async with chatting(tmp_path) as chat:
        await chat.send("one")
        await chat.send("two")
        await chat.send("three")
        assert len(chat.engine.asked) == 1 and chat.app.composer.text == ""
        assert "waits: two" in waiting(chat) and "waits: three" in waiting(chat)
        await chat.say(done("first"))
        assert [m["content"] for m in chat.engine.messages()] == ["one", "first", "two"]
        assert "waits: two" not in waiting(chat) and "waits: three" in waiting(chat)
        await chat.say(done("second", "stopped"))
        await chat.say(done("third"))
        assert chat.line() == ["one", "first", "two", "second", "three", "third"] and not waiting(chat)


async def test_escape_takes_it_back_before_it_stops_the_answer(tmp_path: Path) -> None:
    async with chatting(tmp_path) as chat:
        await chat.send("one")
        await chat.send("two")
        await chat.send("three")
        chat.app.composer.insert("four")
        await chat.pilot.press("escape")
        assert chat.app.composer.text == "two\n\nthree\n\nfour" and not waiting(chat)
        assert chat.state() == "answering"
        assert chat.engine.cancelled == 0
        await chat.pilot.press("escape")
        assert [chat.engine.cancelled] == [1]
        await chat.say(done("first", "stopped"))
        assert len(chat.engine.asked) == 1
        await chat.pilot.press("enter")
        await chat.send("five")
        await chat.pilot.click(Waiting)
        assert chat.app.composer.text == "five"


async def test_it_waits_for_its_own_conversation(tmp_path: Path) -> None:
    """What was sent elsewhere is asked there, and the conversation shown stays."""
    async with chatting(tmp_path) as chat:
        await chat.send("a")
        await chat.app.action_new()
        await chat.send("b")
        await chat.send("c")
        chat.app.composer.insert("draft")
        await chat.say(done("to a"))
        assert chat.line() == ["b", ""] and "waits: c" in waiting(chat) and chat.app.composer.text == "draft"
        await chat.app.open_conversation(1)
        await chat.send("d")
        assert "waits: d" in waiting(chat)
        await chat.say(done("to b"))
        assert chat.line() == ["a", "to a"]
        await chat.say(done("to c"))
        assert chat.line() == ["a", "to a", "d", ""]
        await chat.say(done("to d"))
        await chat.app.open_conversation(2)
        assert chat.line() == ["b", "to b", "c", "to c"] and chat.app.composer.text == "draft"


@pytest.mark.parametrize("end", ["quit", "killed"])
async def test_whatever_ends_the_chat_it_becomes_a_draft(tmp_path: Path, end: str) -> None:
    async with chatting(tmp_path) as chat:
        await chat.send("one")
        chat.app.composer.paste("x" * 5000)
        await chat.pilot.press("enter")
        await chat.pilot.pause()
        await chat.send("three")
        chat.app.composer.insert("four")
        if end == "killed":
            chat.app.drafts.keep()  # a second later
            chat.app.drafts.keep = lambda: None  # type: ignore[method-assign]
        else:
            await chat.pilot.press("ctrl+q")
    async with chatting(tmp_path) as chat:
        await chat.app.open_conversation(1)
        assert chat.app.composer.unsent.message() == "x" * 5000 + "\n\nthree\n\nfour"
    async with chatting(tmp_path) as chat:  # and is there once
        await chat.app.open_conversation(1)
        assert chat.app.composer.unsent.message() == "x" * 5000 + "\n\nthree\n\nfour"
        assert not chat.engine.asked


async def test_what_fails_gives_it_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async with chatting(tmp_path) as chat:
        await chat.send("one")
        await chat.send("two")
        await chat.app.action_new()
        await chat.send("elsewhere")
        await chat.app.open_conversation(1)
        await chat.say(Failed("no memory"))
        assert chat.app.composer.text == "two" and "draft again" in chat.notices() and len(chat.engine.asked) == 1
        await chat.app.action_new()
        assert chat.app.composer.text == "elsewhere"
        await chat.app.open_conversation(1)
        await chat.pilot.press("enter")
        await chat.send("three")

        def fails(*_: object) -> None:
            raise StoreError("damaged")

        monkeypatch.setattr(chat.session, "ask_in", fails)
        await chat.say(done("to two"))
        assert chat.app.composer.text == "three" and "damaged" in chat.notices()


async def test_before_sending_it_is_said_what_reading_takes(tmp_path: Path) -> None:
    async with chatting(tmp_path) as chat:
        composer = chat.app.composer

        async def told(text: str) -> str:
            composer.reset()
            composer.insert(text)
            await chat.pilot.pause(0.4)
            await chat.app.workers.wait_for_complete()
            return str(composer.border_subtitle)

        assert await told("one two") == "2 tokens"
        assert await told("/help") == ""
        await chat.exchange("", "x")
        composer.reset()
        await chat.exchange("one two", "yes", prompt_tokens=1010, reused_tokens=10, prompt_tps=100.0)
        assert await told("word " * 250) == "250 tokens · read in about 2 s"
        assert await told("word") == "1 token"
        assert (await told("w " * 600_000)).startswith("about 600,000 tokens · read in about 1.7 h")
        await chat.app.action_new()
        await chat.say(READY)  # another model: it has read nothing, and nobody knows its pace
        await chat.app.open_conversation(1)
        assert await told("word") == "1 token, and 5,000 before them to read again"
        await chat.say(OnDisk(1, 10, 100, frozenset({"1"})))
        assert await told("word") == "1 token"
        count = chat.engine.count
        chat.engine.count = lambda text: None  # type: ignore[method-assign]
        assert await told("no model now") == ""
        chat.engine.count = count  # type: ignore[method-assign]


async def test_while_reading_the_time_left_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    now = [100.0]
    monkeypatch.setattr("m7mlx_chat.pace.time", SimpleNamespace(monotonic=lambda: now[0]))
    async with chatting(tmp_path) as chat:
        await chat.send("long")
        await chat.say(Prefill(0, 1000))
        answer = chat.app.query_one(Answer)
        assert "left" not in str(answer._footer.content)
        now[0] += 2
        await chat.say(Prefill(100, 1000))
        assert str(answer._footer.content).endswith("100/1,000 tokens · about 18 s left")
        now[0] += 16
        await chat.say(Prefill(900, 1000))
        assert str(answer._footer.content).endswith("900/1,000 tokens · about 2 s left")
        await chat.say(Prefill(1000, 1000), Text("x"))


def test_durations_as_people_say_them() -> None:
    assert [about(s) for s in (0.2, 12.4, 59.4, 90, 3599, 5400)] == [
        "about 1 s",
        "about 12 s",
        "about 59 s",
        "about 2 min",
        "about 60 min",
        "about 1.5 h",
    ]
    pace = Pace()
    pace.learn(4, 1000.0)
    assert pace.seconds(10) is None and pace.left(5, 10) is None


def test_texts_are_joined_with_all_they_stand_for() -> None:
    one, other = UnsentText("a [text: 3]", {"[text: 3]": "xxx"}), UnsentText("[text: 3] b", {"[text: 3]": "yyy"})
    assert joined([one, UnsentText(" "), other, one]).message() == "a xxx\n\nyyy b\n\na xxx"
