"""Every key, command and palette entry while nothing can be written: each is told, and the chat goes on."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from chat_harness import Chat, chatting
from m7mlx_chat import commands
from m7mlx_chat.actions import ACTIONS, Action
from test_screens import notices

from m7mlx.errors import DiskError, RunError

ERRORS = (DiskError("the disk is full: make room"), RunError("another program keeps it locked; close it"))
_QUITS = ("quit", "interrupt", "editor")


def refuse(chat: Chat, error: Exception, monkeypatch: pytest.MonkeyPatch) -> None:
    @contextmanager
    def refused() -> Iterator[None]:
        raise error
        yield

    def raises(*_: object) -> None:
        raise error

    monkeypatch.setattr(chat.store, "_writing", refused)
    for name in ("write_new", "save", "save_preset"):
        monkeypatch.setattr(commands, name, raises)


@pytest.mark.parametrize("error", ERRORS, ids=["full", "locked"])
@pytest.mark.parametrize("place", ["app", "message", "sidebar"])
async def test_every_action(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, place: str, error: Exception) -> None:
    async with chatting(tmp_path) as chat:
        await chat.exchange("question", "answer")
        await chat.exchange("again", "answer")
        with monkeypatch.context() as patched:
            refuse(chat, error, patched)
            await use(chat, place, error)


async def use(chat: Chat, place: str, error: Exception) -> None:
    told = 0
    for action in ACTIONS:
        if action.place != place or action.name in _QUITS:
            continue
        await chat.app.open_conversation(1)
        await do(chat, action)
        told += bool(chat.app._told)
        assert set(chat.app._told) <= {str(error), "there is nothing to export yet"} or place == "app"
        chat.app._told.clear()
        assert chat.app.return_code is None
        while len(chat.app.screen_stack) > 1:
            await chat.pilot.press("escape")
            await chat.pilot.pause(0.05)
    assert told >= 2
    assert str(error) in notices(chat)
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
