"""One engine for all pages: whoever asks waits for those who asked before.

Each page's chat is a process of its own (`m7mlx_chat.borrowed` at its end); the model is in the
server's. A page may have another model, or other settings of the engine, than the one before: then
the engine is set up anew when its turn has come.
"""

from __future__ import annotations

import threading
from collections import deque
from contextlib import suppress
from dataclasses import dataclass
from multiprocessing import Pipe
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from m7mlx import Request, Stats
from m7mlx_chat.events import AnyEngine, Called, Counted, Done, Event, Failed, Ready, Seen, Titled, Waiting
from m7mlx_chat.settings import Settings

_WAIT = 0.1  # seconds to wait for an event at a time


@dataclass(frozen=True)
class _Wanted:
    """A model, and how the engine is to be set up for it."""

    folder: Path
    settings: Settings

    def is_met_by(self, other: _Wanted | None) -> bool:
        if other is None or self.folder != other.folder:
            return False
        return self.settings.sets_engine_up_as(other.settings)


class _Page:
    """A page's chat at the other end of a connection."""

    def __init__(self, connection: Connection) -> None:
        self.connection = connection
        self.wanted: _Wanted | None = None

    def send(self, event: Event | Counted) -> None:
        with suppress(OSError, ValueError):  # it has left
            self.connection.send(event)


@dataclass
class _Turn:
    """What a page has asked for: an answer, or, without a request, that its model be loaded.

    titled  the conversation whose title is the answer: it gives way to all else
    """

    page: _Page
    wanted: _Wanted
    request: Request | None
    titled: int | None = None
    is_cancelled: bool = False

    def send(self, event: Event) -> None:
        """Tell the page; a model that is not wanted any more is not told of."""
        if self.request is not None or not self.is_cancelled:
            self.page.send(event)

    def tell_ended(self) -> None:
        """Tell the page that what it asked for has ended before it began."""
        if self.titled is not None:
            self.page.send(Titled(self.titled, None))
        elif self.request is not None:
            self.page.send(Done("stopped", "", [], Stats(), Seen(0, 0)))


class SharedEngine:
    """Lends an engine to pages, one turn after the other."""

    def __init__(self, engine: AnyEngine) -> None:
        self._engine = engine
        self._changed = threading.Condition()
        self._turns: deque[_Turn] = deque()
        self._current: _Turn | None = None
        self._loaded: _Wanted | None = None
        self._ready: Ready | None = None
        self._is_closing = False
        self._thread = threading.Thread(target=self._run, name="shared engine", daemon=True)

    def start(self) -> None:
        """Begin to take turns."""
        self._engine.start()
        self._thread.start()

    def lend(self) -> Connection:
        """Return the end of a new connection, for a process with a `BorrowedEngine`."""
        ours, theirs = Pipe()
        threading.Thread(target=self._listen, args=(_Page(ours),), name="page", daemon=True).start()
        return theirs

    def close(self) -> None:
        """End the turn under way, then the engine."""
        with self._changed:
            self._is_closing = True
            self._turns.clear()
            self._engine.cancel()
            self._changed.notify_all()
        if self._thread.is_alive():
            self._thread.join(2 * _WAIT)
        self._engine.close()

    # --- what a page says, on a thread of its own -------------------------------------------------

    def _listen(self, page: _Page) -> None:
        with page.connection:
            with suppress(EOFError, OSError):
                while (said := page.connection.recv())[0] != "leave":
                    self._take(page, *said)
            self._cancel(page)

    def _take(self, page: _Page, what: str, *given: Any) -> None:
        match what, given:
            case "load", (folder, settings):
                self._cancel(page)
                page.wanted = _Wanted(folder, settings)
                self._queue(_Turn(page, page.wanted, None))
            case "submit", (request,) if page.wanted is not None:
                self._queue(_Turn(page, page.wanted, request))
            case "title", (conversation, request) if page.wanted is not None:
                self._queue_title(_Turn(page, page.wanted, request, titled=conversation))
            case "forget", (conversation,):
                self._engine.forget(conversation)
            case "count", (number, text):
                page.send(Counted(number, self._count(page, text)))
            case "cancel", _:
                self._cancel(page, only_answers=True)
            case _:
                page.send(Failed("no model has been chosen"))

    def _count(self, page: _Page, text: str) -> int | None:
        """Count the tokens of a text, if the model that is loaded is the page's."""
        if page.wanted is None or not page.wanted.is_met_by(self._loaded):
            return None
        try:
            return self._engine.count(text)
        except Exception:  # it only goes without saying; the page must be listened to
            return None

    def _queue(self, turn: _Turn) -> None:
        with self._changed:
            before = [one for one in (self._current, *self._turns) if one is not None]
            for title in (one for one in before if one.titled is not None):
                title.is_cancelled = True
                self._engine.cancel()
            if any(one.page is not turn.page for one in before if one.titled is None):
                turn.send(Waiting())
            self._turns.append(turn)
            self._changed.notify_all()

    def _queue_title(self, turn: _Turn) -> None:
        """Have a title written while nobody wants anything else; the page asks again later."""
        with self._changed:
            if self._current is None and not self._turns and turn.wanted.is_met_by(self._loaded):
                self._turns.append(turn)
                self._changed.notify_all()
                return
        turn.tell_ended()

    def _cancel(self, page: _Page, *, only_answers: bool = False) -> None:
        """End what a page has asked for; answers that have not begun end at once."""
        with self._changed:
            ended = [t for t in self._turns if t.page is page and (t.request is not None or not only_answers)]
            for turn in ended:
                self._turns.remove(turn)
            current = self._current
            if current is not None and current.page is page and (current.request is not None or not only_answers):
                current.is_cancelled = True
                if current.request is not None:
                    self._engine.cancel()
        for turn in ended:
            turn.tell_ended()

    # --- turns, on one thread ---------------------------------------------------------------------

    def _run(self) -> None:
        while True:
            with self._changed:
                self._current = None
                while not self._turns and not self._is_closing:
                    self._changed.wait()
                if self._is_closing:
                    return
                turn = self._current = self._turns.popleft()
            self._serve(turn)

    def _serve(self, turn: _Turn) -> None:
        if not turn.wanted.is_met_by(self._loaded):
            if not self._load(turn):
                return
        elif turn.request is None and self._ready is not None:
            turn.send(self._ready)
        if turn.request is None:
            return
        with self._changed:  # from here on `_cancel` reaches the engine
            if turn.is_cancelled:
                turn.tell_ended()
                return
            if turn.titled is None:
                self._engine.submit(turn.request)
            else:
                self._engine.write_title(turn.titled, turn.request)
        while not self._is_closing:
            for event in self._engine.drain(_WAIT):
                turn.send(event)
                if isinstance(event, Called | Done | Failed | Titled):
                    return

    def _load(self, turn: _Turn) -> bool:
        """Set the engine up as a page wants it; returns whether it answers."""
        failed: Failed | None = None
        self._engine.load(turn.wanted.folder, turn.wanted.settings)
        while not self._is_closing:
            for event in self._engine.drain(_WAIT):
                if isinstance(event, Failed):
                    failed = event
                    if event.fatal:
                        self._loaded = self._ready = None
                elif isinstance(event, Ready):
                    self._ready = event
                    if failed is None:
                        self._loaded = turn.wanted
                    elif self._loaded is not None:  # the engine goes on as it was, and so does the page
                        turn.page.wanted = self._loaded
                turn.send(event)  # what it changes is known by then
                if isinstance(event, Failed) and event.fatal:
                    return False
                if isinstance(event, Ready):
                    return failed is None or turn.request is None
        return False
