"""A monkey at the keys: whatever it does, the chat goes on, and no message and no draft is lost.

`M7MLX_MONKEY_SECONDS=300 pytest tests/chat/test_monkey.py` lets it play for longer, each time
differently; the seed of a failure is in its message and is played again with `M7MLX_MONKEY_SEED`.
"""

from __future__ import annotations

import asyncio
import json
import os
import random
import time
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest
from chat_harness import READY, Chat, chatting, check_database, done
from m7mlx_chat.actions import ACTIONS, COMMANDS
from m7mlx_chat.config import Config
from m7mlx_chat.events import Failed, Given, Loading, Prefill, Seen, Text, Thought
from m7mlx_chat.unsent import UnsentText
from scripted_tools import ScriptedTools, called
from textual import events
from textual.geometry import Size
from textual.widgets import Input, OptionList

from m7mlx.errors import RunError

SECONDS = float(os.environ.get("M7MLX_MONKEY_SECONDS", "0"))
SEED = os.environ.get("M7MLX_MONKEY_SEED")
_STUCK = 60  # seconds: a move that takes longer will never end
STEPS = 40  # of a short game
_SIZES = ((80, 24), (140, 44), (40, 12), (30, 10), (20, 5), (1, 1), (300, 100), (56, 9), (100, 30))
_KEYS = (
    *(key for action in ACTIONS for key in action.keys.split(",") if key),
    "enter", "tab", "shift+tab", "up", "down", "left", "right", "home", "end", "escape", "space", "a", "/", "@", "[",
)  # fmt: skip
# On the text: they delete what was typed, as they were meant to.
_DELETING = ("delete", "backspace", "ctrl+w", "ctrl+u", "ctrl+k", "ctrl+x", "ctrl+z")
_ANSWER = (
    "# A heading\n\n| a | b |\n|---|---|\n| x | y |\n\n```python\nfor x in y: pass\n```\n\n- one\n\n$\\alpha^2$\n\n"
)
_ARGUMENTS = ("", "x", "temperature 0.5", "temperature hot", "all", "1", "md", "nord", "no-such", "\x1b]0;evil\x07")


class Monkey:
    """Does one thing after another, by chance, and watches over what was said and written."""

    def __init__(self, chat: Chat, seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
        self.chat, self.chance = chat, random.Random(seed)
        self.done: list[str] = []
        self.typed = 0
        self.quits: list[int] = []
        self.asked: dict[int, str] = {}  # the questions that were sent
        monkeypatch.setattr(chat.app, "exit", self._exit)
        self.moves: tuple[tuple[int, Callable[[], Awaitable[None]]], ...] = (
            (8, self.press),
            (4, self.write),
            (4, self.send),
            (1, self.paste),
            (4, self.click),
            (2, self.resize),
            (6, self.answer),
            (4, self.command),
            (2, self.choose),
        )

    def _exit(self, result: object = None, return_code: int = 0, message: object = None) -> None:
        self.quits.append(return_code)

    async def play(self) -> None:
        weights, moves = zip(*self.moves, strict=True)
        await self.chance.choices(moves, weights)[0]()
        await self.chat.pilot.pause()
        self.check()

    def check(self) -> None:
        app, last = self.chat.app, self.done[-12:]
        assert app.is_running and app.failed is None, last
        assert not any(self.quits), (self.quits, last)
        assert not app._faults, (self.chat.notices(), last)
        rows = self.chat.store._db.execute("SELECT id, text FROM message WHERE role = 'user'").fetchall()
        found = {row["id"]: row["text"] for row in rows}
        assert self.asked.items() <= found.items(), last
        self.asked = found

    def written(self) -> str:
        """Every text that the user can get back."""
        rows = self.chat.store._db.execute("SELECT shown, pastes FROM draft").fetchall()
        composer = self.chat.app.composer
        found = [UnsentText(row["shown"], json.loads(row["pastes"])) for row in rows]
        found += [*self.chat.app.drafts._waiting.values(), composer.unsent, composer.draft]
        fields = [field.value for screen in self.chat.app.screen_stack for field in screen.query(Input)]
        return "\n".join([*(one.message() for one in found), *fields, *self.asked.values()])

    # --- what it does -----------------------------------------------------------------------------

    async def press(self) -> None:
        key = self.chance.choice(_KEYS)
        self.done.append(f"press {key}")
        before = self.chat.app.composer.draft.message()
        await self.chat.pilot.press(key)
        await self.chat.pilot.pause()
        self.check()
        if key not in _DELETING and not before.startswith("/") and "@" not in before:
            assert before.strip() in self.written(), (before[:100], self.done[-12:])

    async def write(self) -> None:
        """Type a word: it is somewhere, whatever has the focus."""
        self.typed += 1
        word = f"Q{self.typed}q"
        self.done.append(f"type {word}")
        in_the_chat = len(self.chat.app.screen_stack) == 1
        await self.chat.pilot.press(*word)
        await self.chat.pilot.pause()
        self.check()
        if in_the_chat:
            assert word in self.written(), self.done[-12:]

    async def send(self) -> None:
        await self.write()
        await self.chat.pilot.press("enter")

    async def paste(self) -> None:
        text = self.chance.choice(
            ("short", "line\r\n" * 60, "x" * 5000, "\x1b]0;evil\x07\x9b", "[b]not bold[/b", "", " ")
        )
        self.done.append(f"paste {text[:20]!r}")
        self.chat.app.post_message(events.Paste(text))

    async def click(self) -> None:
        size = self.chat.app.size
        x, y = self.chance.randrange(size.width), self.chance.randrange(size.height)
        self.done.append(f"click {x} {y}")
        await self.chat.pilot.click(offset=(x, y), times=self.chance.choice((1, 1, 1, 2, 3)))

    async def resize(self) -> None:
        size = Size(*self.chance.choice(_SIZES))
        self.done.append(f"resize {size}")
        self.chat.app._driver._size = tuple(size)  # type: ignore[union-attr]
        self.chat.app.post_message(events.Resize(size, size))

    async def answer(self) -> None:
        """Have the engine say what it may say now."""
        place = self.chance.randrange(len(_ANSWER))
        text = _ANSWER[place : place + self.chance.randrange(80)]
        under_way = self.chat.session.under_way
        said: list[Any]
        if under_way is not None and under_way.calling is not None:
            said = [Given(under_way.calling.id, "given", text), Given("another", "failed", "x")]
        elif under_way is None or not under_way.submitted:
            said = [READY, Failed("it cannot be loaded", fatal=True), Loading(1, 10)]
        else:
            whole = under_way.text.removeprefix((under_way.begun or ("", None))[0])
            said = [Text(text, 3, Seen(self.chance.randrange(9000), 10**6))] * 3
            said += [called({"a": text}, {}, text=whole, first=self.chance.randrange(10**6))] * 2
            said += [Thought("hm", 2), Prefill(1, 8, 0), Failed("no memory"), done(whole), done(whole, "length")]
            said += [done(whole, "stopped")] * (self.chat.engine.cancelled > 0)
        event = self.chance.choice(said)
        self.done.append(f"say {type(event).__name__}")
        self.chat.engine.events.append(event)
        while self.chat.engine.events:  # the app takes it in its own time
            await self.chat.pilot.pause(0.02)

    async def command(self) -> None:
        name = self.chance.choice([name for name in COMMANDS if name not in ("bye", "quit", "exit")])
        line = f"/{name} {self.chance.choice(_ARGUMENTS)}".strip()
        self.done.append(line)
        if len(self.chat.app.screen_stack) == 1:
            self.chat.app.drafts.clear()
            self.chat.app.composer.insert(line)
            self.chat.app.composer.focus()
            await self.chat.pilot.press("escape", "enter")

    async def choose(self) -> None:
        """Choose in the list that is in front, if there is one."""
        self.done.append("choose")
        for options in self.chat.app.screen.query(OptionList):
            if options.display and options.option_count and options.can_focus:
                options.focus()
                await self.chat.pilot.press("down", "enter")
                break


async def refused(*_: object) -> Path:
    raise RunError("nothing is fetched here")


def _seeds() -> list[int]:
    if SEED is not None:
        return [int(SEED)]
    return [random.randrange(10**6)] if SECONDS else [1, 2]


@pytest.mark.timeout(max(120, SECONDS * 3))
@pytest.mark.parametrize("seed", _seeds())
async def test_whatever_it_does(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, seed: int) -> None:
    monkeypatch.chdir(tmp_path)
    for job in ("fetch", "convert", "convert_to", "plan", "search", "list_files"):
        monkeypatch.setattr(f"m7mlx_chat.jobs.{job}", refused)
    monkeypatch.setattr("m7mlx_chat.screens.models.models", lambda *_: [])
    monkeypatch.setattr("m7mlx_chat.commands.copying.copy_with_tool", lambda text: False)
    config = Config(tmp_path / "config.toml", presets={"precise": {"temperature": 0.5}})
    size = random.Random(seed).choice(_SIZES[:6])
    until = time.monotonic() + SECONDS
    async with chatting(tmp_path, size=size, config=config, notifications=True) as chat:
        await chat.exchange("the first question", _ANSWER)
        chat.session.tools = ScriptedTools()
        monkey = Monkey(chat, seed, monkeypatch)
        played = 0
        while played < STEPS or time.monotonic() < until:
            try:
                async with asyncio.timeout(_STUCK):
                    await monkey.play()
            except BaseException as error:
                if isinstance(error, TimeoutError):
                    for task in asyncio.all_tasks():
                        task.print_stack()
                print(f"seed {seed}, after {played}: {' · '.join(monkey.done[-20:])}")
                raise
            played += 1
        monkeypatch.undo()
        chat.app.drafts.keep()
    check_database(tmp_path / "chats.db")
