"""An engine in another process: what a page of the browser asks, the server answers."""

from __future__ import annotations

import os
import threading
from contextlib import suppress
from multiprocessing.connection import Connection
from pathlib import Path
from queue import Empty, SimpleQueue

from m7mlx import Request
from m7mlx_chat.event_queue import EventQueue
from m7mlx_chat.events import Counted, Event, Failed
from m7mlx_chat.settings import Settings

_COUNT_SECONDS = 10.0  # for a text to be counted


class BorrowedEngine:
    """An `AnyEngine` at the other end of a connection (`m7mlx_chat.web.shared.SharedEngine`)."""

    def __init__(self, file: int) -> None:
        """Take the end of the connection that this process was given: an open file's number."""
        os.set_inheritable(file, False)
        self._connection = Connection(file)
        self._events = EventQueue()
        self._counting = threading.Lock()
        self._to_count = 0  # texts so far
        self._counted: SimpleQueue[Counted] = SimpleQueue()
        self._thread = threading.Thread(target=self._read, name="borrowed engine", daemon=True)

    def start(self) -> None:
        """Begin to listen."""
        self._thread.start()

    def load(self, folder: Path, settings: Settings) -> None:
        """Have answers made by a model; what is under way here ends."""
        self._send("load", folder, settings)

    def submit(self, request: Request) -> None:
        """Answer a request when its turn has come."""
        self._send("submit", request)

    def count(self, text: str) -> int | None:
        """Count the tokens of a text; None where another page's model is loaded, too."""
        with self._counting:
            self._to_count += 1
            self._send("count", self._to_count, text)
            with suppress(Empty):
                while (told := self._counted.get(timeout=_COUNT_SECONDS)).number != self._to_count:
                    pass  # the answer to an earlier text came too late
                return told.tokens
        return None

    def forget(self, conversation: int) -> None:
        """Keep nothing on the disk of a conversation that was deleted."""
        self._send("forget", conversation)

    def write_title(self, conversation: int, request: Request) -> None:
        """Answer a request for a title, if no page asks anything else of the model now."""
        self._send("title", conversation, request)

    def cancel(self) -> None:
        """End what was submitted from here."""
        self._send("cancel")

    def drain(self, wait: float = 0.0) -> list[Event]:
        """Return the events since the last call; wait so many seconds for one if there is none."""
        return self._events.drain(wait)

    def close(self) -> None:
        """Leave; the engine goes on for others."""
        self._send("leave")

    def _send(self, *what: object) -> None:
        with suppress(OSError):  # the server has ended, which `_read` tells
            self._connection.send(what)

    def _read(self) -> None:
        with suppress(EOFError, OSError):
            while True:
                told = self._connection.recv()
                self._counted.put(told) if isinstance(told, Counted) else self._events.put(told)
        self._events.put(Failed("the server of this page has ended"))
