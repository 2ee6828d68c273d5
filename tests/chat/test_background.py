"""The terminal's title and bell: what they tell whoever looks elsewhere while the model answers."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import pytest
from chat_harness import Chat, chatting, done
from m7mlx_chat.app import ChatApp
from m7mlx_chat.commands import background
from m7mlx_chat.config import Config
from m7mlx_chat.events import Failed, Text
from scripted_tools import ScriptedTools, called
from textual.events import AppBlur, AppFocus

BELL = "\x07"


class Sent:
    """What is sent to the terminal."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.all: list[str] = []
        monkeypatch.setattr(ChatApp, "send_to_terminal", lambda _, sequence: self.all.append(sequence))

    @property
    def titles(self) -> list[str]:
        return [one[4:-1] for one in self.all if one.startswith("\x1b]0;")]

    @property
    def rings(self) -> int:
        return self.all.count(BELL)


@pytest.fixture
def sent(monkeypatch: pytest.MonkeyPatch) -> Sent:
    return Sent(monkeypatch)


async def leave(chat: Chat) -> None:
    chat.app.post_message(AppBlur())
    await chat.pilot.pause()


async def come_back(chat: Chat) -> None:
    chat.app.post_message(AppFocus())
    await chat.pilot.pause()


async def test_the_title_tells_the_conversation_and_whether_it_is_answered(tmp_path: Path, sent: Sent) -> None:
    async with chatting(tmp_path) as chat:
        assert sent.titles == ["m7mlx"]
        await chat.send("About apples")
        await chat.say(Text("Much", 1), Text(" to say", 3))
        assert sent.titles[-1] == "● About apples · m7mlx"
        await chat.say(done("Much to say."))
        assert sent.titles[-1] == "About apples · m7mlx"
        await chat.send("/rename Fruit")
        assert sent.titles[-1] == "Fruit · m7mlx"
        await chat.send("/new")
        assert sent.titles[-1] == "m7mlx"
        assert len(sent.titles) == len([a for a, b in zip(sent.titles, ["", *sent.titles], strict=False) if a != b])
        assert sent.rings == 0  # the user has been here all the time


async def test_an_answer_that_ends_unseen_rings_and_is_marked(tmp_path: Path, sent: Sent) -> None:
    async with chatting(tmp_path) as chat:
        await chat.send("About apples")
        await leave(chat)
        assert sent.titles[-1] == "● About apples · m7mlx"
        await chat.say(done("Much to say."))
        assert (sent.rings, sent.titles[-1]) == (1, "✓ About apples · m7mlx")
        await come_back(chat)
        assert sent.titles[-1] == "About apples · m7mlx"
        await chat.exchange("More", "Yes.")
        assert sent.rings == 1
        await chat.send("Even more")
        await leave(chat)
        await chat.say(Failed("no"))
        assert sent.rings == 2  # a failure is an end, too


async def test_what_waits_for_its_turn_is_answered_before_it_rings(tmp_path: Path, sent: Sent) -> None:
    async with chatting(tmp_path) as chat:
        await chat.send("First")
        await chat.send("Second")
        await leave(chat)
        await chat.say(done("One."))
        assert (sent.rings, sent.titles[-1]) == (0, "● First · m7mlx")
        await chat.say(done("Two."))
        assert (sent.rings, sent.titles[-1]) == (1, "✓ First · m7mlx")


async def test_one_that_took_long_rings_in_any_case_and_one_that_was_stopped_does_not(
    tmp_path: Path,
    sent: Sent,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(background, "_LONG_SECONDS", 0.0)
    async with chatting(tmp_path) as chat:
        await chat.send("About apples")
        await chat.pilot.press("escape")
        await leave(chat)
        await chat.say(done("Much", "stopped"))
        assert (sent.rings, sent.titles[-1]) == (0, "About apples · m7mlx")
        await come_back(chat)
        await chat.exchange("More", "Yes.")
        assert (sent.rings, sent.titles[-1]) == (1, "About apples · m7mlx")


async def test_a_call_that_waits_for_the_users_word_rings_once(tmp_path: Path, sent: Sent) -> None:
    async with chatting(tmp_path) as chat:
        chat.session.tools = ScriptedTools()
        await chat.send("Write it down")
        await leave(chat)
        await chat.say(called({}))
        await chat.app.drain()
        await chat.pilot.pause()
        assert (sent.rings, sent.titles[-1]) == (1, "? Write it down · m7mlx")


async def test_both_can_be_turned_off(tmp_path: Path, sent: Sent) -> None:
    async with chatting(tmp_path, config=Config(tmp_path / "config.toml", bell=False, terminal_title=False)) as chat:
        await chat.send("About apples")
        await leave(chat)
        await chat.say(done("Much to say."))
        assert sent.all == []


async def test_nothing_in_a_title_is_for_the_terminal_to_obey(tmp_path: Path, sent: Sent) -> None:
    async with chatting(tmp_path) as chat:
        await chat.send("a question")
        stored = "UPDATE conversation SET title = ?"  # by another program, say: ours keeps no such title
        chat.store._db.execute(stored, ["a\x1b]0;b\x07c\x9cd\x9de\r\nf\u202eg" + "x" * 5000])
        chat.app.show_title()
        assert sent.titles[-1].startswith("● a␛]0;b␇c")
        assert not re.search("[\x00-\x1f\x7f-\x9f\u202e]", sent.titles[-1])
        assert len(sent.titles[-1]) < 120


async def test_a_test_and_a_browser_have_no_terminal(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    async with chatting(tmp_path) as chat:
        await chat.send("About apples")
        await leave(chat)
        await chat.say(done("Much to say."))
    assert "\x1b]0;" not in "".join(capfd.readouterr())
    assert sys.__stderr__ is not None
