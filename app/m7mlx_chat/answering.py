"""The answer under way: asked of the engine, and kept in the store as it comes."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass
from typing import Any

from m7mlx import Request
from m7mlx.errors import InputError, M7Error
from m7mlx_chat.events import AnyEngine, Done, Event, Failed, Ready, Seen, Text, Thought
from m7mlx_chat.history import history, ids_for
from m7mlx_chat.settings import Settings
from m7mlx_chat.store import Store
from m7mlx_chat.store.rows import Ending

# between two saves of an answer under way: less than a second, whatever the timers do
_GROW_SECONDS = 0.7
_FINISH_SECONDS = 3.0  # for the engine to end its token
_ENDINGS: dict[str, Ending] = {"stop": "complete", "length": "length", "stopped": "stopped"}


class Busy(InputError):
    """Only one answer can be under way."""


@dataclass
class UnderWay:
    """The answer under way: where it goes, how it is made, and all that it says so far.

    begun           what it said before it was broken off: a text, and its token ids where known
    earlier_tokens  how many tokens that took
    thought         what the model has thought by now
    submitted       the engine has been asked; before, the model is still being loaded
    saved           when it was last saved
    """

    conversation: int
    question: int
    answer: int
    settings: Settings
    text: str = ""
    begun: tuple[str, list[int] | None] | None = None
    earlier_tokens: int = 0
    thought: str = ""
    submitted: bool = False
    saved: float = 0.0


class Answering:
    """One answer at most, in whichever conversation, from the question to its end.

    under_way  the answer, if there is one
    ready      the model, once it is loaded
    seen       where its cache stands
    schema     a JSON schema that every answer must fit
    """

    def __init__(self, store: Store, engine: AnyEngine) -> None:
        self.store = store
        self.under_way: UnderWay | None = None
        self.ready: Ready | None = None
        self.seen = Seen(0, 0)
        self.schema: Mapping[str, Any] | None = None
        self._engine = engine
        self._unsaved: list[Callable[[], None]] = []

    def check_free(self) -> None:
        """Raise Busy while an answer is under way."""
        if self.under_way is not None:
            raise Busy("the model is still answering: Esc stops it")

    def begin(self, under_way: UnderWay) -> None:
        """Have the engine answer: now, or as soon as the model is loaded."""
        self.under_way = under_way
        if self.ready is not None:
            self._submit(under_way)

    def stop(self) -> None:
        """End the answer under way; what it says so far is kept."""
        if self.under_way is None:
            return
        if self.under_way.submitted:
            self._engine.cancel()
        else:  # no model yet
            self._finish("stopped", {})

    def handle(self, event: Event) -> None:
        """Keep what an event of the engine brings."""
        match event:
            case Ready():
                self.ready, self.seen = event, Seen(0, 0)
                if self.under_way is not None and not self.under_way.submitted:
                    self._submit(self.under_way)
            case Text(text, _, seen):
                self.seen = seen or self.seen
                if self.under_way is not None:
                    self._grow(self.under_way, text)
            case Thought(text):
                if self.under_way is not None:
                    self.under_way.thought += text
            case Done():
                self.seen = event.seen
                if self.under_way is not None:
                    self._done(self.under_way, event)
            case Failed(message, fatal):
                if fatal:
                    self.ready = None
                if self.under_way is not None and (fatal or self.under_way.submitted):
                    self._fail(self.under_way, message)
            case _:
                pass

    def end(self) -> None:
        """End the answer under way with all that was said, then the engine.

        Raises what the store does if that cannot be saved.
        """
        try:
            with suppress(M7Error):
                self.stop()
            until = time.monotonic() + _FINISH_SECONDS
            while self.under_way is not None and time.monotonic() < until:
                for event in self._engine.drain(0.1):
                    with suppress(M7Error):
                        self.handle(event)
            self.save_again()
        finally:
            self._engine.close()

    def save_again(self) -> None:
        """Save answers that have ended but could not be saved: the disk was full, say.

        Raises as the store does.
        """
        while self._unsaved:
            self._unsaved[0]()
            self._unsaved.pop(0)

    @property
    def vocabulary(self) -> str | None:
        """The name of the model's vocabulary; None while there is no model."""
        return None if self.ready is None else self.ready.vocabulary

    def _submit(self, under_way: UnderWay) -> None:
        try:
            request = self._request(under_way)
        except Exception as error:  # the store cannot be read, say: the next question is free
            with suppress(M7Error):  # kept in `_unsaved`
                self._finish("error", {"error": str(error)})
            raise
        under_way.submitted, under_way.saved = True, time.monotonic()
        self._engine.submit(request)

    def _request(self, under_way: UnderWay) -> Request:
        settings = under_way.settings
        text, ids = under_way.begun or ("", None)
        if under_way.begun is not None:  # only now is it known which model goes on with it
            ids = ids_for(self.store.message(under_way.answer), self.vocabulary)
            under_way.begun = (text, ids)
        return Request(
            history(self.store.branch(under_way.question), settings.system, self.vocabulary),
            settings.sampling,
            settings.max_tokens,
            settings.stop,
            continues=text if ids is None else ids,
            schema=self.schema,
            effort=settings.reasoning_effort,
        )

    def _grow(self, under_way: UnderWay, text: str) -> None:
        under_way.text += text
        if time.monotonic() - under_way.saved > _GROW_SECONDS:
            self.store.grow(under_way.answer, under_way.text)
            under_way.saved = time.monotonic()

    def _done(self, under_way: UnderWay, done: Done) -> None:
        begun_text, begun_ids = under_way.begun or ("", [])
        under_way.text = begun_text + done.text
        statistics = asdict(done.statistics) | {"seen": done.seen.tokens, "cache_bytes": done.seen.cache_bytes}
        statistics["generated_tokens"] += under_way.earlier_tokens
        if self.vocabulary is not None:
            statistics["vocabulary"] = self.vocabulary
        self._finish(_ENDINGS[done.reason], statistics, None if begun_ids is None else [*begun_ids, *done.ids])

    def _fail(self, under_way: UnderWay, message: str) -> None:
        """End an answer with a failure; what it had begun with can still be gone on with."""
        text, ids = under_way.begun or ("", None)
        statistics: dict[str, Any] = {"error": message}
        if ids is not None and under_way.text == text:
            statistics |= {"generated_tokens": under_way.earlier_tokens, "vocabulary": self.vocabulary}
        else:
            ids = None
        self._finish("error", statistics, ids)

    def _finish(self, status: Ending, statistics: dict[str, Any], ids: list[int] | None = None) -> None:
        assert self.under_way is not None
        ended, self.under_way = self.under_way, None
        if ended.thought:
            statistics |= {"thought": ended.thought}
        self._unsaved.append(lambda: self.store.finish(ended.answer, status, ended.text, statistics, ids))
        self.save_again()
