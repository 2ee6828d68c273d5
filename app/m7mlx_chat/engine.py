"""The one thread that owns the model: it loads, evaluates and generates; others send it messages.

MLX's streams belong to the thread that made them, so a pool will not do. Commands go in through a queue;
events come out through a list that the app drains on a timer. No array ever crosses.
"""

from __future__ import annotations

import os
import threading
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from queue import SimpleQueue
from typing import Any, Literal

import mlx.core as mx

from m7mlx import Mistral, RollingCache, Tokenizer, load, stream_generate
from m7mlx.errors import M7Error
from m7mlx.speculative import Drafter
from m7mlx_chat.settings import Settings


@dataclass(frozen=True)
class Loading:
    """`done` of `total` bytes of the model have been read."""

    done: int
    total: int


@dataclass(frozen=True)
class Ready:
    """The model answers from now on; `window` None means full attention over `context` tokens."""

    window: int | None
    context: int
    nbytes: int


@dataclass(frozen=True)
class Prefill:
    """`done` of `total` tokens of the prompt have been read."""

    done: int
    total: int


@dataclass(frozen=True)
class Text:
    """More of the answer."""

    text: str


@dataclass(frozen=True)
class Done:
    """The answer has ended, and everything up to here is in the cache.

    tokens_seen counts all positions since the conversation began, whatever the window still holds of them.
    """

    reason: Literal["stop", "length", "stopped"]
    text: str
    ids: list[int]
    tokens_per_second: float
    time_to_first_token: float
    reused_tokens: int
    tokens_seen: int
    cache_bytes: int


@dataclass(frozen=True)
class Failed:
    """A command failed, in one line; the engine goes on."""

    message: str
    fatal: bool = False  # no model could be loaded
    exit_status: int = 1


Event = Loading | Ready | Prefill | Text | Done | Failed


class _Stopped(Exception):
    """Raised inside a prefill to end it."""


@dataclass
class _Answer:
    """One answer under way."""

    text: str = ""
    ids: list[int] = field(default_factory=list)
    started: float = field(default_factory=time.perf_counter)
    first: float = 0.0

    def add(self, text: str, ids: Sequence[int]) -> None:
        self.first = self.first or time.perf_counter()
        self.text += text
        self.ids += ids

    def speed(self) -> float:
        seconds = time.perf_counter() - self.first
        return (len(self.ids) - 1) / seconds if len(self.ids) > 1 and seconds > 0 else 0.0


class Engine:
    """Start it, `submit` conversations, `drain` events. All methods return at once and may be called anywhere."""

    def __init__(self, folder: Path, settings: Settings) -> None:
        self._folder = folder
        self._settings = settings
        self._commands: SimpleQueue[Callable[[], None] | None] = SimpleQueue()
        self._events: list[Event] = []
        self._lock = threading.Lock()
        self._submitted = self._answering = 0  # requests, counted from 1
        self._cancelled = 0  # the last request that is not wanted any more
        self._closing = threading.Event()
        self._model: Mistral | None = None
        self._tokenizer: Tokenizer | None = None
        self._cache: RollingCache | None = None
        self._drafter: Drafter | None = None
        self._thread = threading.Thread(target=self._run, name="m7mlx-engine", daemon=True)

    def start(self) -> None:
        """Begin to load the model."""
        self._thread.start()

    def submit(self, messages: Sequence[dict[str, Any]]) -> None:
        """Answer a conversation; the events end with one Done or Failed."""
        copied = [dict(m) for m in messages]
        self._submitted += 1
        request = self._submitted
        self._commands.put(lambda: self._answer(request, copied))

    def cancel(self) -> None:
        """End what was submitted so far, the answer under way within one token; its text so far is kept."""
        self._cancelled = self._submitted

    def drain(self) -> list[Event]:
        """The events since the last call, neighbouring texts joined."""
        with self._lock:
            events, self._events = self._events, []
        joined: list[Event] = []
        for event in events:
            if isinstance(event, Text) and joined and isinstance(joined[-1], Text):
                joined[-1] = Text(joined[-1].text + event.text)
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
            self._load()
        except _Stopped:  # closed while loading
            pass
        except Exception as error:  # whatever it was, the app must hear of it
            self._emit(_failed(error, fatal=True))
        else:
            while (command := self._commands.get()) is not None:
                try:
                    command()
                except Exception as error:
                    self._emit(_failed(error))
        finally:
            self._model = self._tokenizer = self._cache = self._drafter = None
            # Streams left to the thread's own end abort the process every third time (mlx 0.32, Linux).
            mx.clear_streams()

    def _load(self) -> None:
        def progress(done: int, total: int) -> None:
            if self._closing.is_set():
                raise _Stopped
            self._emit(Loading(done, total))

        self._model, self._tokenizer = load(self._folder, progress=progress)
        self._cache = self._model.new_cache(**self._settings.cache)
        self._drafter = self._settings.drafter(self._model, self._tokenizer)
        config = self._model.config
        self._emit(
            Ready(self._cache.max_kv_size or self._cache.window, config.max_position_embeddings, self._model.nbytes)
        )

    def _answer(self, request: int, messages: list[dict[str, Any]]) -> None:
        assert self._model is not None
        assert self._tokenizer is not None
        assert self._cache is not None
        if self._closing.is_set():
            return
        self._answering = request
        answer = _Answer()
        reason: Literal["stop", "length", "stopped"] = "stopped"
        reused = self._cache.offset
        stream = stream_generate(
            self._model,
            self._tokenizer,
            messages,
            cache=self._cache,
            drafter=self._drafter,
            sampling=self._settings.sampling,
            max_tokens=self._settings.max_tokens,
            stop=self._settings.stop,
            on_prefill=self._on_prefill,
        )
        try:
            for piece in stream:
                answer.add(piece.text, piece.ids)
                self._emit(Text(piece.text))
                if piece.stats:
                    reason, reused = piece.stats.finish_reason, piece.stats.reused_tokens
                elif self._unwanted:
                    break
        except _Stopped:
            pass
        finally:
            stream.close()
        ids = answer.ids
        if ids and ids[-1] in self._tokenizer.eos_ids:
            ids = ids[:-1]
        elif reason == "stop":  # a stop text: what the model wrote of it is not part of the answer
            ids = self._tokenizer.encode(answer.text)
        self._emit(
            Done(
                reason=reason,
                text=answer.text,
                ids=ids,
                tokens_per_second=answer.speed(),
                time_to_first_token=(answer.first or time.perf_counter()) - answer.started,
                reused_tokens=reused,
                tokens_seen=self._cache.offset,
                cache_bytes=self._cache.nbytes,
            )
        )

    @property
    def _unwanted(self) -> bool:
        return self._answering <= self._cancelled

    def _on_prefill(self, done: int, total: int) -> None:
        if self._unwanted:
            raise _Stopped
        self._emit(Prefill(done, total))

    def _emit(self, event: Event) -> None:
        with self._lock:
            self._events.append(event)


def _failed(error: Exception, fatal: bool = False) -> Failed:
    """An exception as an event. One that nobody foresaw leaves its traceback on fd 2: the app's log."""
    text = " ".join(str(error).split()) or type(error).__name__
    if isinstance(error, M7Error):
        return Failed(text, fatal, error.exit_status)
    os.write(2, "".join(traceback.format_exception(error)).encode("utf-8", "replace"))
    return Failed(f"{type(error).__name__}: {text}", fatal)
