"""The answer under way: asked of the engine, and kept in the store as it comes."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import asdict, replace
from typing import Any

from m7mlx import Request
from m7mlx.errors import InputError, M7Error
from m7mlx_chat.events import (
    AnyEngine,
    AnyTools,
    Called,
    Done,
    Event,
    Failed,
    Given,
    Listed,
    NoTools,
    OnDisk,
    Ready,
    Seen,
    Text,
    Thought,
    Titled,
    Word,
)
from m7mlx_chat.history import history, ids_for
from m7mlx_chat.servers import ROUNDS
from m7mlx_chat.steps import Call, Step, closed, messages_of
from m7mlx_chat.store import Store
from m7mlx_chat.store.rows import Ending
from m7mlx_chat.titles import Titles
from m7mlx_chat.under_way import UnderWay

# between two saves of an answer under way: less than a second, whatever the timers do
_GROW_SECONDS = 0.7
_FINISH_SECONDS = 3.0  # for the engine to end its token
_ENDINGS: dict[str, Ending] = {"stop": "complete", "length": "length", "stopped": "stopped"}


class Busy(InputError):
    """Only one answer can be under way."""


class Answering:
    """One answer at most, in whichever conversation, from the question to its end.

    under_way  the answer, if there is one
    ready      the model, once it is loaded
    seen       where its cache stands
    on_disk    what lies on the disk of conversations; None where none is kept
    in_memory  conversations that were answered since the model was loaded: it mostly holds them
    schema     a JSON schema that every answer must fit
    tools      what the model may call
    rounds     how often it may call tools in one answer
    """

    def __init__(self, store: Store, engine: AnyEngine) -> None:
        self.store = store
        self.under_way: UnderWay | None = None
        self.ready: Ready | None = None
        self.seen = Seen(0, 0)
        self.on_disk: OnDisk | None = None
        self.in_memory: set[int] = set()
        self.schema: Mapping[str, Any] | None = None
        self.tools: AnyTools = NoTools()
        self.rounds = ROUNDS
        self._titles = Titles(store)
        self._engine = engine
        self._unsaved: list[Callable[[], None]] = []

    def check_free(self) -> None:
        """Raise Busy while an answer is under way."""
        if self.under_way is not None:
            raise Busy("the model is still answering: Esc stops it")

    def begin(self, under_way: UnderWay) -> None:
        """Have the engine answer: now, or as soon as model and tools are there."""
        self.under_way = under_way
        self._go_on(under_way)

    def _go_on(self, under_way: UnderWay) -> None:
        if self.ready is not None and self.tools.is_settled and not under_way.submitted and not under_way.waits:
            self._submit(under_way)

    def stop(self) -> None:
        """End the answer under way; what it says so far is kept."""
        if self.under_way is None:
            return
        if self.under_way.submitted:
            self.under_way.is_stopped = True
            self._engine.cancel()
        else:  # no model yet, or a call is waited for
            self._finish("stopped", self.under_way.spent)

    def decide(self, word: Word) -> None:
        """Have the call that waits for the user's word made, or refused."""
        under_way = self.under_way
        if under_way is None or under_way.asking is None:
            return
        call, under_way.asking = under_way.asking, None
        if word in ("always", "never"):
            self.tools.remember(call, word)
        if word in ("once", "always"):
            self._make(under_way, call)
        else:
            self._end_call(under_way, replace(call, outcome="refused"))

    def handle(self, event: Event) -> None:
        """Keep what an event of the engine brings."""
        match event:
            case OnDisk():
                self.on_disk = event
            case Ready():
                self.ready, self.seen = event, Seen(0, 0)
                self.in_memory.clear()
                if self.under_way is not None:
                    self._go_on(self.under_way)
            case Listed():
                if self.under_way is not None:
                    self._go_on(self.under_way)
            case Text(text, _, seen):
                self.seen = seen or self.seen
                if self.under_way is not None:
                    self._grow(self.under_way, text)
            case Thought(text):
                if self.under_way is not None:
                    self.under_way.thought += text
            case Called():
                self.seen = event.seen
                if self.under_way is not None:
                    self._called(self.under_way, event)
            case Given():
                if self.under_way is not None:
                    self._given(self.under_way, event)
            case Done():
                self.seen = event.seen
                if self.under_way is not None:
                    self.in_memory.add(self.under_way.conversation)
                    self._titles.answered(self.under_way.conversation)
                    self._done(self.under_way, event)
            case Titled():
                self._titles.take(event)
            case Failed(message, fatal):
                if fatal:
                    self.ready = None
                if self.under_way is not None and (fatal or self.under_way.submitted):
                    self._fail(self.under_way, message)
            case _:
                pass

    def write_title(self, model: str) -> None:
        """Have the model that is loaded write a title, if one is wanted and nothing else is."""
        if self.under_way is None and self.ready is not None and (wanted := self._titles.wanted(model)) is not None:
            self._engine.write_title(*wanted)

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
            self.tools.close()
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
        before = history(self.store.branch(under_way.question), settings.system, self.vocabulary)
        return Request(
            [*before, *messages_of(under_way.steps)],
            settings.sampling,
            settings.max_tokens,
            settings.stop,
            continues=text if ids is None else ids,
            schema=self.schema,
            effort=settings.reasoning_effort,
            tools=self.tools.functions(),
            space=str(under_way.conversation),
        )

    def _grow(self, under_way: UnderWay, text: str) -> None:
        under_way.text += text
        if time.monotonic() - under_way.saved > _GROW_SECONDS:
            self.store.grow(under_way.answer, under_way.text)
            under_way.saved = time.monotonic()

    # --- calls of tools ---------------------------------------------------------------------------

    def _called(self, under_way: UnderWay, called: Called) -> None:
        """Note the calls of the model, and make the first one."""
        begun, _ = under_way.begun or ("", None)
        under_way.steps.append(Step(begun + called.text, called.calls))
        under_way.earlier_tokens += called.statistics.generated_tokens
        under_way.begun, under_way.text = None, ""
        under_way.submitted = False
        under_way.rounds += 1
        if under_way.is_stopped:
            self._finish("stopped", under_way.spent)
            return
        try:
            self._save_steps(under_way)
        finally:  # where the disk is full, say, it goes on, and all is saved later
            self._next_call(under_way)

    def _next_call(self, under_way: UnderWay) -> None:
        """Make the next call, ask for it, or tell the model what all of them gave."""
        while (call := under_way.steps[-1].open_call) is not None:
            verdict, why = self.tools.judge(call)
            if verdict == "ask":
                under_way.asking = call
                return
            if verdict == "make":
                self._make(under_way, call)
                return
            ended = replace(call, outcome="failed" if why else "refused", result=why)
            under_way.steps[-1] = under_way.steps[-1].with_call(ended)
        if under_way.rounds >= self.rounds:
            often = f"tools were called {under_way.rounds} times without an answer; /continue lets it go on"
            self._finish("error", under_way.spent | {"error": often})
        else:
            self._go_on(under_way)

    def _make(self, under_way: UnderWay, call: Call) -> None:
        under_way.calling = call
        self.tools.make(call)

    def _given(self, under_way: UnderWay, given: Given) -> None:
        call = under_way.calling
        if call is not None and call.id == given.call:
            under_way.calling = None
            self._end_call(under_way, replace(call, outcome=given.outcome, result=given.result))

    def _end_call(self, under_way: UnderWay, call: Call) -> None:
        under_way.steps[-1] = under_way.steps[-1].with_call(call)
        try:
            self._save_steps(under_way)
        finally:
            self._next_call(under_way)

    def _save_steps(self, under_way: UnderWay) -> None:
        self.store.grow(under_way.answer, under_way.text, under_way.with_steps({}))
        under_way.saved = time.monotonic()

    # --- the end ----------------------------------------------------------------------------------

    def _done(self, under_way: UnderWay, done: Done) -> None:
        begun_text, begun_ids = under_way.begun or ("", [])
        under_way.text = begun_text + done.text
        statistics = asdict(done.statistics) | {"seen": done.seen.tokens, "cache_bytes": done.seen.cache_bytes}
        statistics["generated_tokens"] += under_way.earlier_tokens
        if done.from_disk:
            statistics["from_disk"] = True
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
        if ended.calling is not None:
            self.tools.cancel()
        ended.steps = closed(ended.steps)
        statistics = ended.with_steps(statistics) | {"ended": self.store.clock()}
        if ended.thought:
            statistics |= {"thought": ended.thought}
        self._unsaved.append(lambda: self.store.finish(ended.answer, status, ended.text, statistics, ids))
        self.save_again()
