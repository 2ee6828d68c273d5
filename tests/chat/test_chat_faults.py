"""The chat when its disk cannot be written: every action that writes is tried."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from chat_harness import Chat, chatting, done
from m7mlx_chat.config import Config
from m7mlx_chat.events import Text
from textual.widgets import Input

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


async def do(chat: Chat, keys: list[str]) -> None:
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
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "theirs.json").write_text(THEIRS)
    config = Config(tmp_path / "config.toml", presets={"precise": {"temperature": 0.5}})
    async with chatting(tmp_path, config=config, notifications=True) as chat:
        await chat.exchange("deleted", "answer")
        await do(chat, ["/delete"])
        await chat.exchange("question", "answer")
        await do(chat, ["/retry"])
        await chat.say(Text("another"), done("another"))
        chat.app.clear_notifications()
        before = kept(chat)
        chat.store._db.execute("PRAGMA query_only = 1")
        await do(chat, WRITING[name])
        told = [notification.message for notification in chat.app._notifications]
        assert len(told) == 1 and "chats.db cannot be written" in told[0]
        assert kept(chat) == before
        if name == "send":
            assert chat.app.composer.text == "a question"
        chat.app.composer.reset()
        chat.store._db.execute("PRAGMA query_only = 0")
        await chat.pilot.press("escape", "escape")
        await chat.exchange("still there?", "yes")
        assert chat.line()[-2:] == ["still there?", "yes"]
