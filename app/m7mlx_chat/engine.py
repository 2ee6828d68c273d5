"""The one thread that owns the model: it loads, evaluates and generates; others send it messages.

MLX's streams belong to the thread that made them, so a pool will not do. Commands go in through a queue;
events come out through a list that the app drains on a timer. No array ever crosses.
"""

from __future__ import annotations

import hashlib
import os
import threading
import time
import traceback
from collections.abc import Callable, Generator
from dataclasses import replace
from pathlib import Path
from queue import SimpleQueue
from typing import TYPE_CHECKING, Literal

import mlx.core as mx

from m7mlx import Mistral, Piece, Request, RollingCache, Stats, Tokenizer, load
from m7mlx.config import ModelConfig
from m7mlx.decode import shared_start
from m7mlx.errors import M7Error
from m7mlx.generation import stream_answer
from m7mlx.memory import budget, cache_bytes
from m7mlx.request import prepare
from m7mlx.speculative import Drafter, PromptLookup, load_draft_model
from m7mlx_chat.branches import Branches
from m7mlx_chat.events import Done, Event, Failed, Loading, Prefill, Ready, Seen, Text
from m7mlx_chat.settings import Settings

if TYPE_CHECKING:
    from m7mlx.cache import CacheOptions
    from m7mlx.parallel.world import World

THREAD = "m7mlx-engine"
_BRANCHES = 0.1  # of the machine's memory, for caches of branches that were left
_TOLD_SECONDS = 0.1  # between two looks at the cache, or at the progress of loading


_REASONS: dict[str | None, Literal["stop", "length"]] = {"stop": "stop", "length": "length"}


class _Stopped(Exception):
    """Raised while loading to end it."""


class Engine:
    """Start it, `load` a model, `submit` requests, `drain` events. All methods return at once, on any thread."""

    def __init__(self, world: World | None = None) -> None:
        """`world`, where the model is divided among processes, of which this is the first."""
        self._world = world
        self._commands: SimpleQueue[Callable[[], None] | None] = SimpleQueue()
        self._events: list[Event] = []
        self._changed = threading.Condition()
        self._submitted = self._answering = 0  # requests, counted from 1
        self._cancelled = 0  # the last request that is not wanted any more
        self._loads = 0  # the last one counts
        self._closing = threading.Event()
        self._folder: Path | None = None
        self._model: Mistral | None = None
        self._tokenizer: Tokenizer | None = None
        self._cache: RollingCache | None = None
        self._cache_options: CacheOptions = {}
        self._drafter: Drafter | None = None
        self._ready: Ready | None = None
        self._branches = Branches(int(budget() * _BRANCHES))
        self._thread = threading.Thread(target=self._run, name=THREAD, daemon=True)

    def start(self) -> None:
        """Begin to take commands."""
        self._thread.start()

    def load(self, folder: Path, settings: Settings) -> None:
        """Load a model, in the place of the one before, with the cache and the draft model of `settings`.

        What is under way ends. A model that is loaded already is not read again. The events end with Ready or a
        fatal Failed.
        """
        self.cancel()
        self._loads += 1
        load = self._loads
        self._commands.put(lambda: self._load(load, folder, settings))

    def submit(self, request: Request) -> None:
        """Answer; the events end with one Done or Failed."""
        self._submitted += 1
        number = self._submitted
        self._commands.put(lambda: self._answer(number, request))

    def cancel(self) -> None:
        """End what was submitted so far, the answer under way within one token; its text so far is kept."""
        self._cancelled = self._submitted

    def drain(self, wait: float = 0.0) -> list[Event]:
        """The events since the last call, neighbouring texts joined; `wait` seconds for one if there is none."""
        with self._changed:
            if not self._events and wait:
                self._changed.wait(wait)
            events, self._events = self._events, []
        joined: list[Event] = []
        for event in events:
            last = joined[-1] if joined else None
            if isinstance(event, Text) and isinstance(last, Text):
                joined[-1] = replace(event, text=last.text + event.text, seen=event.seen or last.seen)
            else:
                joined.append(event)
        return joined

    def close(self, timeout: float = 5.0) -> None:
        """End the thread, in the middle of an answer too."""
        self._closing.set()
        self.cancel()
        self._commands.put(None)
        if self._thread.is_alive():
            self._thread.join(timeout)

    # --- on the engine's thread -------------------------------------------------------------------------

    def _run(self) -> None:
        try:
            while (command := self._commands.get()) is not None:
                try:
                    command()
                except _Stopped:
                    pass
                except Exception as error:  # whatever it was, the app must hear of it
                    self._emit(_failed(error, fatal=self._model is None))
        finally:
            if self._world is not None:
                self._world.close()
            self._forget()
            # Streams left to the thread's own end abort the process every third time (mlx 0.32, Linux).
            mx.clear_streams()

    def _forget(self) -> None:
        self._model = self._tokenizer = self._cache = self._drafter = self._folder = self._ready = None
        self._branches.clear()
        mx.clear_cache()

    def _load(self, number: int, folder: Path, settings: Settings) -> None:
        told = 0.0

        def progress(done: int, total: int) -> None:
            nonlocal told
            if self._closing.is_set() or number != self._loads:
                raise _Stopped
            if time.monotonic() - told > _TOLD_SECONDS or done == total:
                told = time.monotonic()
                self._emit(Loading(done, total))

        progress(0, 0)
        if folder != self._folder or self._model is None or self._tokenizer is None:
            ModelConfig.from_folder(folder)  # raises, before the model that is here goes to make room
            self._forget()
            read = load if self._world is None else self._world.load
            self._model, self._tokenizer = read(folder, progress=progress)
            self._folder = folder
        try:
            drafter = _drafter(settings.speculate, self._model, self._tokenizer)
            cache = self._model.new_cache(**settings.cache)
        except M7Error as error:
            if self._ready is None:
                self._forget()
                raise
            self._emit(_failed(error))  # the model goes on as it was
        else:
            self._branches.clear()
            self._drafter, self._cache, self._cache_options = drafter, cache, settings.cache
            self._ready = _described(self._model, cache, folder)
        self._emit(self._ready)

    def _answer(self, number: int, request: Request) -> None:
        if self._closing.is_set():
            return
        model, tokenizer, cache = self._model, self._tokenizer, self._cache
        assert model is not None and tokenizer is not None and cache is not None, "nothing is loaded"
        self._answering = number
        request = prepare(request, model, tokenizer, cache)
        if self._world is not None:
            request = self._world.share(request, self._cache_options)
        if shared_start(cache.ids, request.ids) < len(cache.ids) - 1:
            self._branches.keep(cache)  # of another branch, or another conversation: the user may come back

        def on_prefill(done: int, total: int) -> None:
            self._emit(Prefill(done, total, len(request.ids) - total))
            if done == total and not can_roll_back(cache, request.max_tokens):
                self._branches.keep(cache)  # another answer to the same question needs it as it is now

        pieces = stream_answer(
            model,
            tokenizer,
            request,
            cache,
            drafter=self._drafter,
            snapshots=self._branches.snapshots,
            on_prefill=on_prefill,
            is_cancelled=lambda: self._unwanted,
        )
        self._emit(self._told(pieces, cache, tokenizer))

    def _told(self, pieces: Generator[Piece, None, None], cache: RollingCache, tokenizer: Tokenizer) -> Done:
        """Tell an answer piece by piece; how it ended."""
        text, ids, looked, piece = "", list[int](), 0.0, Piece()
        for piece in pieces:
            text += piece.text
            ids += piece.ids
            now = time.perf_counter()
            seen, looked = (self._seen(cache), now) if now - looked > _TOLD_SECONDS else (None, looked)
            if piece.text:
                self._emit(Text(piece.text, len(ids), seen))
        if ids and ids[-1] in tokenizer.eos_ids:
            ids = ids[:-1]
        elif piece.finish_reason == "stop":  # a stop text: what the model wrote of it is not part of the answer
            ids = tokenizer.encode(text)
        return Done(
            _REASONS.get(piece.finish_reason, "stopped"), text, ids, piece.stats or Stats(), self._seen(cache)
        )

    def _seen(self, cache: RollingCache) -> Seen:
        return Seen(cache.offset, cache.nbytes, self._branches.nbytes)

    @property
    def _unwanted(self) -> bool:
        return self._answering <= self._cancelled

    def _emit(self, event: Event) -> None:
        with self._changed:
            self._events.append(event)
            self._changed.notify_all()


def _described(model: Mistral, cache: RollingCache, folder: Path) -> Ready:
    config = model.config
    bits = 8 * model.dtype.size if cache.format.bits is None else cache.format.bits + 0.5
    return Ready(
        window=cache.max_kv_size or cache.window,
        capacity=cache.window + cache.slack if cache.window else None,
        context=config.max_position_embeddings,
        nbytes=model.nbytes,
        sinks=cache.n_sinks,
        vocabulary=vocabulary(folder),
        token_bytes=cache_bytes(config, 1, bits),
    )


def can_roll_back(cache: RollingCache, max_tokens: int | None) -> bool:
    """Whether the tokens of an answer could be undone one by one when it has ended."""
    if cache.window is None:
        return True
    return max_tokens is not None and cache.offset + max_tokens <= cache.window + cache.slack


def vocabulary(folder: Path) -> str:
    """A name for the meaning of ids: a hash of the tokenizer's files."""
    files = sorted([*folder.glob("tokenizer.json"), *folder.glob("tokenizer.model*")])
    return hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest()[:16]


def _drafter(how: str, model: Mistral, tokenizer: Tokenizer) -> Drafter | None:
    if how == "off":
        return None
    return PromptLookup() if how == "lookup" else load_draft_model(how, model, tokenizer)


def _failed(error: Exception, fatal: bool = False) -> Failed:
    """An exception as an event. One that nobody foresaw leaves its traceback on fd 2: the app's log."""
    text = " ".join(str(error).split()) or type(error).__name__
    if isinstance(error, M7Error):
        return Failed(text, fatal, error.exit_status)
    os.write(2, "".join(traceback.format_exception(error)).encode("utf-8", "replace"))
    return Failed(f"{type(error).__name__}: {text}", fatal)
