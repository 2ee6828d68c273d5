"""The one thread that owns the model: it loads, evaluates and generates; others send it messages.

MLX's streams belong to the thread that made them, so a pool will not do. Commands go in through a
queue; events come out through a list that the app drains on a timer. No array ever crosses.
"""

from __future__ import annotations

import os
import threading
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from queue import Empty, SimpleQueue

import mlx.core as mx

from m7mlx import Request, load
from m7mlx.cache_folder import remove_space
from m7mlx.config import ModelConfig
from m7mlx.errors import M7Error, PromptTooLongError
from m7mlx.parallel.world import World
from m7mlx_chat import ENGINE_THREAD
from m7mlx_chat.event_queue import EventQueue
from m7mlx_chat.events import Event, Failed, Loading, Titled
from m7mlx_chat.loaded import LoadedModel
from m7mlx_chat.settings import Settings

_TOLD_SECONDS = 0.1  # between two events of the progress of loading


class _Stopped(Exception):
    """Raised while loading to end it."""


class Engine:
    """Owns the model: start it, `load` a model, `submit` requests, `drain` events.

    All methods return at once, on any thread. What begins with an underscore runs on the engine's.
    """

    def __init__(self, world: World | None = None, copies: Path | None = None) -> None:
        """Make an engine.

        world   is there where processes share the model, this one the first
        copies  where conversations are copied to, so that they go on at once the next time
        """
        self._world = world
        self._copies = copies if world is None else None
        self._commands: SimpleQueue[Callable[[], None] | None] = SimpleQueue()
        self._events = EventQueue()
        self._submitted = self._answering = 0  # requests, for titles too, counted from 1
        self._cancelled = 0  # the last request that is not wanted any more
        self._loads = 0  # the last one counts
        self._closing = threading.Event()
        self._loaded: LoadedModel | None = None
        self._thread = threading.Thread(target=self._run, name=ENGINE_THREAD, daemon=True)

    def start(self) -> None:
        """Begin to take commands."""
        self._thread.start()

    def load(self, folder: Path, settings: Settings) -> None:
        """Load a model in the place of the one before, with the cache and drafter of `settings`.

        What is under way ends. A model that is loaded already is not read again. The events end
        with Ready or a fatal Failed.
        """
        self.cancel()
        self._loads += 1
        number = self._loads
        self._commands.put(lambda: self._load(number, folder, settings))

    def submit(self, request: Request) -> None:
        """Answer a request; the events end with one Done or Failed."""
        self._submitted += 1
        number = self._submitted
        self._commands.put(lambda: self._answer(number, request))

    def write_title(self, conversation: int, request: Request) -> None:
        """Answer a request for a title on the side; the next command breaks it off.

        The events end with one Titled.
        """
        self._submitted += 1
        number = self._submitted
        self._commands.put(lambda: self._write_title(number, conversation, request))

    def cancel(self) -> None:
        """End what was asked for so far, within one token; an answer's text so far is kept."""
        self._cancelled = self._submitted

    def count(self, text: str) -> int | None:
        """Count the tokens of a text, on the thread that asks; None where no model is loaded."""
        loaded = self._loaded
        return None if loaded is None else len(loaded.tokenizer.encode(text))

    def forget(self, conversation: int) -> None:
        """Keep nothing on the disk of a conversation that was deleted."""
        self._commands.put(lambda: self._forget_conversation(str(conversation)))

    def drain(self, wait: float = 0.0) -> list[Event]:
        """Return the events since the last call; wait so many seconds for one if there is none."""
        return self._events.drain(wait)

    def close(self, timeout: float = 5.0) -> None:
        """End the thread, in the middle of an answer too."""
        self._closing.set()
        self.cancel()
        self._commands.put(None)
        if self._thread.is_alive():
            self._thread.join(timeout)

    # --- on the engine's thread -----------------------------------------------------------------

    def _run(self) -> None:
        try:
            while (command := self._next()) is not None:
                try:
                    command()
                except _Stopped:
                    pass
                except Exception as error:  # whatever it was, the app must hear of it
                    self._events.put(_failed(error, fatal=self._loaded is None))
        finally:
            if self._world is not None:
                self._world.close()
            self._forget()
            # Left to the thread's own end, streams abort the process every third time (mlx 0.32,
            # Linux).
            mx.clear_streams()

    def _next(self) -> Callable[[], None] | None:
        """Wait for a command; when none has come for a while, what was answered is copied."""
        while True:
            try:
                return self._commands.get(timeout=None if self._loaded is None else self._loaded.quiet_seconds)
            except Empty:
                if self._loaded is not None:
                    self._loaded.copy()

    def _forget(self) -> None:
        if self._loaded is not None:
            self._loaded.close()
        self._loaded = None
        mx.clear_cache()

    def _forget_conversation(self, space: str) -> None:
        if self._loaded is not None:
            self._loaded.forget(space)
        elif self._copies is not None:
            remove_space(self._copies, space)

    def _load(self, number: int, folder: Path, settings: Settings) -> None:
        told = 0.0

        def progress(done: int, total: int) -> None:
            nonlocal told
            if self._closing.is_set() or number != self._loads:
                raise _Stopped
            if time.monotonic() - told > _TOLD_SECONDS or done == total:
                told = time.monotonic()
                self._events.put(Loading(done, total))

        progress(0, 0)
        loaded = self._loaded
        if loaded is None or loaded.folder != folder:
            del loaded  # to make room, once it is clear that there is another
            ModelConfig.from_folder(folder)  # raises
            self._forget()
            read = load if self._world is None else self._world.load
            model, tokenizer = read(folder, progress=progress)
            self._loaded = loaded = LoadedModel(
                folder, model, tokenizer, settings, self._events.put, world=self._world, copies=self._copies
            )
        else:
            try:
                loaded.set_up(settings)
            except M7Error as error:
                self._events.put(_failed(error))  # the model goes on as it was
        self._events.put(loaded.ready)

    def _answer(self, number: int, request: Request) -> None:
        if self._closing.is_set():
            return
        assert self._loaded is not None, "nothing is loaded"
        self._answering = number
        self._loaded.answer(request, lambda: self._answering <= self._cancelled)

    def _write_title(self, number: int, conversation: int, request: Request) -> None:
        def is_cancelled() -> bool:
            return self._closing.is_set() or not self._commands.empty() or number <= self._cancelled

        text: str | None = None
        if self._loaded is not None and self._world is None:
            try:
                text = self._loaded.write_title(request, is_cancelled)
            except Exception as error:  # nobody has asked for it: there is no title then
                _failed(error)
                text = ""
        self._events.put(Titled(conversation, text))


def _failed(error: Exception, fatal: bool = False) -> Failed:
    """Turn an exception into an event.

    One that nobody foresaw leaves its traceback on fd 2, which is the app's log.
    """
    text = " ".join(str(error).split()) or type(error).__name__
    if isinstance(error, M7Error):
        room = error.room if isinstance(error, PromptTooLongError) else None
        return Failed(text, fatal, error.exit_status, room)
    os.write(2, "".join(traceback.format_exception(error)).encode("utf-8", "replace"))
    return Failed(f"{type(error).__name__}: {text}", fatal)
