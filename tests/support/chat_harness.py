"""The chat on an engine that says what the test tells it to."""

from __future__ import annotations

import sqlite3
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, closing
from pathlib import Path
from typing import Any, cast

from m7mlx_chat.app import ChatApp
from m7mlx_chat.config import Config
from m7mlx_chat.environment import Environment
from m7mlx_chat.events import Done, Event, Ready, Seen
from m7mlx_chat.session import Session
from m7mlx_chat.settings import Settings
from m7mlx_chat.store import Store
from m7mlx_chat.view import Parts
from textual.pilot import Pilot
from textual.widgets import Static

from m7mlx import Request, Stats

READY = Ready(window=4096, capacity=4160, context=32768, nbytes=4_000_000_000, vocabulary="v", token_bytes=131072)


class ScriptedEngine:
    """Says what the test tells it to; remembers what it was asked."""

    def __init__(self) -> None:
        self.events: list[Event] = []
        self.asked: list[Request] = []
        self.loaded: list[tuple[Path, Settings]] = []
        self.cancelled = 0
        self.forgotten: list[int] = []
        self.titles: list[tuple[int, Request]] = []

    def start(self) -> None: ...

    def close(self) -> None: ...

    def load(self, folder: Path, settings: Settings) -> None:
        self.loaded.append((folder, settings))

    def submit(self, request: Request) -> None:
        self.asked.append(request)

    def messages(self, number: int = -1) -> list[dict[str, Any]]:
        """The messages that it was asked to answer: the last ones, or another time's."""
        return cast("list[dict[str, Any]]", self.asked[number].prompt)

    def write_title(self, conversation: int, request: Request) -> None:
        self.titles.append((conversation, request))

    def cancel(self) -> None:
        self.cancelled += 1

    def count(self, text: str) -> int | None:
        return len(text.split())

    def forget(self, conversation: int) -> None:
        self.forgotten.append(conversation)

    def drain(self, wait: float = 0.0) -> list[Event]:
        if wait and not self.events:
            time.sleep(min(wait, 0.01))
        # one after the other: another thread may be adding some
        return [self.events.pop(0) for _ in range(len(self.events))]


def done(text: str, reason: Any = "stop", *, seen: int = 5000, **changes: Any) -> Done:
    values: dict[str, Any] = {
        "prompt_tokens": 10,
        "generated_tokens": len(text.split()),
        "generation_tps": 21.5,
        "time_to_first_token": 0.3,
    }
    return Done(reason, text, [7] * len(text.split()), Stats(**values | changes), Seen(seen, 545_000_000))


class Chat:
    """A running app with its engine, and the shortcuts the tests need."""

    def __init__(self, app: ChatApp, engine: ScriptedEngine, session: Session, pilot: Pilot[None]) -> None:
        self.app, self.engine, self.session, self.pilot = app, engine, session, pilot
        self.store = session.store

    async def say(self, *events: Event) -> None:
        self.engine.events += events
        await self.app.drain()
        await self.pilot.pause()

    async def send(self, text: str) -> None:
        """Send a message, or run a command; one that has failed makes room."""
        if self.app.composer.text.startswith("/"):
            self.app.composer.reset()
        self.app.composer.focus()
        self.app.composer.insert(text)
        await self.pilot.pause()
        await self.pilot.press("enter")
        await self.pilot.pause()

    async def exchange(self, question: str, answer: str, **changes: Any) -> None:
        """A question, and its whole answer."""
        await self.send(question)
        await self.say(done(answer, **changes))

    def texts(self, kind: type[Static] | str) -> list[str]:
        return [str(w.content) for w in self.app.query(kind).results(Static)]

    def state(self) -> str:
        """What the model is doing."""
        return self.app.state

    def status(self) -> str:
        return str(self.app.screen_stack[0].query_one("#state", Static).content)

    def footers(self) -> list[str]:
        return [str(w.content) for w in self.app.query(".footer").results(Static)]

    def line(self) -> list[str]:
        """The texts of the messages shown, by the store."""
        return [m.text for m in self.store.read(self.session.line)]

    def notices(self) -> str:
        """All that is told in the corner."""
        return "\n".join(notification.message for notification in self.app._notifications)

    def told(self) -> str:
        """What the screen of models says at its end."""
        return str(self.app.screen.query_one("#told", Static).content)

    async def settled(self) -> None:
        """Wait until what works in the background has ended, and is shown."""
        await self.app.workers.wait_for_complete()
        await self.pilot.pause()

    def shown(self) -> str:
        """The screen as text."""
        lines = self.app.screen._compositor.render_strips(self.app.size)
        return "\n".join(strip.text.rstrip() for strip in lines)


def environment_in(folder: Path) -> Environment:
    """An environment with all files in a folder."""
    return Environment(folder / "data", folder / "config.toml", folder / "chat.log")


@asynccontextmanager
async def chatting(
    folder: Path,
    *,
    size: tuple[int, int] = (100, 30),
    ready: bool = True,
    settings: Settings | None = None,
    config: Config | None = None,
    environment: Environment | None = None,
    model: Path | None = Path("/models/small"),
    notifications: bool = False,
    clock: Callable[[], float] = time.time,
    **options: Any,
) -> AsyncIterator[Chat]:
    """The app over a database in `folder`."""
    with Store(folder / "chats.db", clock=clock) as store:
        engine = ScriptedEngine()
        session = Session(store, engine, settings or Settings(model="a[b]/model"))
        environment = environment or environment_in(folder)
        parts = Parts(engine, session, config or Config(environment.config), environment)
        app = ChatApp(parts, folder=model, **options)
        async with app.run_test(size=size, notifications=notifications) as pilot:
            chat = Chat(app, engine, session, pilot)
            if ready:
                await chat.say(READY)
            yield chat


def check_database(path: Path) -> None:
    """Have SQLite itself say that the file, the indexes of words and the references are sound."""
    with closing(sqlite3.connect(path)) as db:
        assert db.execute("PRAGMA integrity_check").fetchall() == [("ok",)]
        assert db.execute("PRAGMA foreign_key_check").fetchall() == []
        for table in ("message_words", "message_parts"):
            db.execute(f"INSERT INTO {table} ({table}, rank) VALUES ('integrity-check', 1)")
