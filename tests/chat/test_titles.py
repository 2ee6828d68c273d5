"""Titles by the model: when they are asked for, what is taken, and what is never written over."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
from chat_harness import Chat, chatting, done
from m7mlx_chat import app
from m7mlx_chat.commands import titles as quiet
from m7mlx_chat.config import Config, read_config
from m7mlx_chat.events import Text, Titled
from m7mlx_chat.titles import clean_title
from textual.events import AppBlur

FAST: dict[str, Any] = {"prompt_tps": 500.0}


@asynccontextmanager
async def answered(folder: Path, monkeypatch: pytest.MonkeyPatch, **options: Any) -> AsyncIterator[Chat]:
    """A chat in which one question has been answered, and nothing been done for a while."""
    monkeypatch.setattr(quiet, "_QUIET_SECONDS", 0.0)
    monkeypatch.setattr(app, "_LOOK_SECONDS", 3600.0)  # the tests look around themselves
    async with chatting(folder, size=(130, 30), **options) as chat:
        await chat.exchange("Tell me about apples, please", "Apples are " + "red " * 1000, **FAST)
        yield chat


def title(chat: Chat, conversation: int = 1) -> str:
    return chat.store.conversation(conversation).title


@pytest.mark.parametrize(
    ("written", "cleaned"),
    [
        ("Apples of the World", "Apples of the World"),
        ("\n\n  Apples  of\tthe World\nand more", "Apples of the World"),
        ("**Title:** “Apples of the World.”", "Apples of the World"),
        ("# Title: 'Apples'!", "Apples"),
        ("1. `git reset`", "git reset"),
        ("What is an apple?", "What is an apple?"),
        ("苹果的种类", "苹果的种类"),
        ("a\x1b]0;b\x07\u202ec", "a]0;bc"),
        ("", ""),
        ("...", ""),
        ('""', ""),
        ("Title", ""),
        ("Untitled", ""),
        ("Sure! Here is a title", ""),
        ("I'm sorry, I cannot", ""),
        ("Here's one: Apples", ""),
        ("The function f takes a number x and returns x + 1.", ""),  # a sentence
        ("x" * 61, ""),
        ("The edit: the edit: the edit: the", ""),
    ],
)
def test_what_is_a_title(written: str, cleaned: str) -> None:
    assert clean_title(written) == cleaned


async def test_a_title_is_asked_for_when_it_is_quiet(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async with answered(tmp_path, monkeypatch) as chat:
        assert title(chat) == "Tell me about apples, please"
        chat.app.look_around()
        chat.app.look_around()  # it is being written
        ((conversation, request),) = chat.engine.titles
        prompt = str(request.prompt)
        assert conversation == 1 and "Tell me about apples, please" in prompt and "Apples are red" in prompt
        assert len(prompt) < 1000 and request.max_tokens is not None and request.max_tokens < 50
        assert len(chat.engine.asked) == 1
        await chat.say(Titled(1, '"Apples of the World."\n\nIt is a good title.'))
        assert title(chat) == "Apples of the World"
        assert "Apples of the World" in chat.shown().splitlines()[0]
        assert chat.app.title == "Apples of the World"
        await chat.exchange("More", "Yes.", **FAST)
        chat.app.look_around()
        assert len(chat.engine.titles) == 1  # once
        await chat.send("/rename")
        chat.app.screen.query_one("Input").value = ""  # type: ignore[attr-defined]
        await chat.pilot.press("enter")
        assert title(chat) == "Tell me about apples, please"


async def test_what_a_user_chose_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async with answered(tmp_path, monkeypatch) as chat:
        chat.app.look_around()
        await chat.send("/rename Fruit")  # while it is being written
        await chat.say(Titled(1, "Apples of the World"))
        assert title(chat) == "Fruit"
        await chat.send("/new")
        await chat.exchange("Pears", "Yes.", **FAST)
        await chat.send("/rename My pears")
        chat.app.look_around()
        assert len(chat.engine.titles) == 1


@pytest.mark.parametrize("written", ["", "Sure!", "word " * 30])
async def test_nothing_useful_changes_nothing(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    written: str,
) -> None:
    async with answered(tmp_path, monkeypatch) as chat:
        chat.app.look_around()
        await chat.say(Titled(1, written))
        assert title(chat) == "Tell me about apples, please"
        chat.app.look_around()
        assert len(chat.engine.titles) == 1  # and is not tried over and over


async def test_one_that_was_broken_off_is_asked_for_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async with answered(tmp_path, monkeypatch) as chat:
        chat.app.look_around()
        await chat.send("And pears?")
        assert len(chat.engine.asked) == 2  # it is asked at once
        await chat.say(Titled(1, None), Text("Pears"))
        chat.app.look_around()
        assert len(chat.engine.titles) == 1  # not during an answer
        await chat.say(done("Pears are green.", **FAST))
        chat.app.look_around()
        assert [number for number, _ in chat.engine.titles] == [1, 1]


async def test_it_is_not_asked_for_at_once_nor_while_something_is_typed(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    async with answered(tmp_path, monkeypatch) as chat:
        monkeypatch.setattr(quiet, "_QUIET_SECONDS", 1000.0)
        chat.app.look_around()
        chat.app._stirred -= 2000
        await chat.pilot.press("x")
        chat.app.look_around()
        assert chat.engine.titles == []
        chat.app._stirred -= 2000
        chat.app.post_message(AppBlur())
        chat.app.look_around()
        assert len(chat.engine.titles) == 1


@pytest.mark.parametrize("why", ["off", "another model", "slow", "thinks", "no model"])
async def test_where_no_title_is_asked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, why: str) -> None:
    config = Config(tmp_path / "config.toml", model_titles=why != "off")
    async with answered(tmp_path, monkeypatch, config=config) as chat:
        if why == "another model":
            chat.session.settings = chat.session.settings.changed({"model": "another"})
        elif why == "no model":
            chat.session.ready = None
        elif why == "slow":
            chat.store._db.execute("""UPDATE message SET statistics = '{"prompt_tps": 20, "generation_tps": 5}'""")
        elif why == "thinks":
            chat.store._db.execute("UPDATE message SET statistics = json_set(statistics, '$.thought', 'hm')")
        chat.app.look_around()
        assert chat.engine.titles == []


def test_the_switch_in_the_file(tmp_path: Path) -> None:
    path = tmp_path / "config.toml"
    assert read_config(path).model_titles
    path.write_text("model_titles = false\n")
    assert not read_config(path).model_titles
