"""Every key and command while nothing can be written: that is told, and the chat goes on."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
from chat_harness import Chat, chatting, done
from effort import some
from m7mlx_chat import exporting
from m7mlx_chat.actions import ACTIONS, Action
from m7mlx_chat.commands import settings
from m7mlx_chat.config import Config
from m7mlx_chat.events import Text
from textual.widgets import Input

from m7mlx.errors import DiskError, RunError

ERRORS = (DiskError("the disk is full: make room"), RunError("another program keeps it locked; close it"))
PLACES = [
    (place, error)
    for number, place in enumerate(("app", "message", "sidebar"))
    for error in some(ERRORS, 2, first=number)
]
_QUITS = ("quit", "interrupt", "editor")


def refuse(chat: Chat, error: Exception, monkeypatch: pytest.MonkeyPatch) -> None:
    def raises(*_: object) -> None:
        raise error

    monkeypatch.setattr(chat.store, "_writing", raises)
    for module, name in ((exporting, "write_new"), (settings, "save"), (settings, "save_preset")):
        monkeypatch.setattr(module, name, raises)


@pytest.mark.parametrize(("place", "error"), PLACES)
async def test_every_action(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, place: str, error: Exception) -> None:
    async with chatting(tmp_path) as chat:
        await chat.exchange("question", "answer")
        await chat.exchange("again", "answer")
        with monkeypatch.context() as patched:
            refuse(chat, error, patched)
            await use(chat, place, error)


async def use(chat: Chat, place: str, error: Exception) -> None:
    told = 0
    lines: set[str] = set()  # what was told: it leaves the corner after a while
    for action in ACTIONS:
        if action.place != place or action.name in _QUITS:
            continue
        await chat.app.open_conversation(1)
        await do(chat, action)
        told += bool(chat.app._told)
        assert set(chat.app._told) <= {str(error), "there is nothing to export yet"} or place == "app"
        lines |= set(chat.app._told)
        chat.app._told.clear()
        assert chat.app.return_code is None
        while len(chat.app.screen_stack) > 1:
            await chat.pilot.press("escape")
            await chat.pilot.pause(0.05)
    assert told >= 2
    assert str(error) in lines
    await chat.app.open_conversation(1)
    assert chat.line() == ["question", "answer", "again", "answer"]
    chat.app.composer.reset()
    await chat.send("what is typed stays")
    assert chat.app.composer.text == "what is typed stays"


async def do(chat: Chat, action: Action) -> None:
    """Run an action in its place."""
    if action.place == "message":
        await chat.pilot.press("escape", "alt+up")
    elif action.place == "sidebar":
        chat.app.sidebar.add_class("-shown")
        chat.app.show_conversations()
        chat.app.sidebar.conversations.focus()
        chat.app.sidebar.conversations.action_first()
    if action.keys and action.place != "app":
        await chat.pilot.press(action.keys.split(",")[0])
    else:
        name, _, argument = action.name.partition("(")
        await chat.app.run_action(f"app.{name}({argument or ')'}")
        if action.slash and action.takes:
            await chat.app.run_action(f"app.{name}('{_argument(action)}')")
    await chat.pilot.pause(0.05)


def _argument(action: Action) -> str:
    known = {"set": "top_p 0.5", "theme": "nord", "rename": "a title", "system": "Be brief", "preset": "none"}
    return known.get(action.slash, re.sub(r"\W", "", action.takes).lower())


# --- a database that can only be read -------------------------------------------------------------

WRITING: dict[str, list[str]] = {  # keys, or a line that is sent
    "send": ["a question"],
    "put away": ["ctrl+b", "a"],
    "delete": ["ctrl+b", "d"],
    "give a title": ["ctrl+b", "r", "x", "enter"],
    "answer again": ["alt+up", "r"],
    "copy up to here": ["alt+up", "f"],
    "the version before": ["alt+up", "left_square_bracket"],
    "change a setting": ["f2", "enter"],
    **{line: [line] for line in ("/retry", "/fork", "/archive", "/delete", "/rename x", "/undo", "/system Be brief")},
    **{line: [line] for line in ("/set temperature 0.5", "/preset precise", "/import theirs.json")},
}
THEIRS = '[{"title": "t", "mapping": {"a": {"parent": null, "message": {"author": {"role": "user"}, "content": {"parts": ["x"]}}}}}]'  # noqa: E501


def kept(chat: Chat) -> list[Any]:
    return [*chat.store.conversations(), *chat.store.read(chat.session.line)]


async def type_in(chat: Chat, keys: list[str]) -> None:
    if " " in keys[0] or keys[0].startswith("/"):
        await chat.send(keys[0])
    elif keys[0] == "f2":
        await chat.pilot.press("f2")
        field = chat.app.screen.query_one("#field-temperature", Input)
        field.value = "0.7"
        field.focus()
        await chat.pilot.press(*keys[1:])
    else:
        await chat.pilot.press(*keys)
    await chat.app.workers.wait_for_complete()
    await chat.pilot.pause()


@pytest.mark.parametrize("name", WRITING)
async def test_a_disk_that_cannot_be_written_is_told_and_the_chat_lives(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    name: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "theirs.json").write_text(THEIRS)
    config = Config(tmp_path / "config.toml", presets={"precise": {"temperature": 0.5}})
    async with chatting(tmp_path, config=config, notifications=True) as chat:
        await chat.exchange("deleted", "answer")
        await type_in(chat, ["/delete"])
        await chat.exchange("question", "answer")
        await type_in(chat, ["/retry"])
        await chat.say(Text("another"), done("another"))
        chat.app.clear_notifications()
        before = kept(chat)
        chat.store._db.execute("PRAGMA query_only = 1")
        await type_in(chat, WRITING[name])
        assert chat.notices().count("\n") == 0 and "chats.db cannot be written" in chat.notices()
        assert kept(chat) == before
        if name == "send":
            assert chat.app.composer.text == "a question"
        chat.app.composer.reset()
        chat.store._db.execute("PRAGMA query_only = 0")
        await chat.pilot.press("escape", "escape")
        await chat.exchange("still there?", "yes")
        assert chat.line()[-2:] == ["still there?", "yes"]
