"""What is said, between the store and the engine: no word is shown that is not kept.

    session.ask("Hello")              stores the question, then asks the engine
    session.handle(event)             stores what comes, at least every second
    session.line                      ids of the messages shown, from the first to the last

One answer is under way at most, in whichever conversation; another conversation may be read meanwhile.
"""

from __future__ import annotations

import secrets
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

from m7mlx import Request
from m7mlx.errors import InputError
from m7mlx_chat.engine import Engine
from m7mlx_chat.events import Done, Event, Failed, Ready, Seen, Text
from m7mlx_chat.settings import ANSWER, ENGINE, Settings, known
from m7mlx_chat.store import Store
from m7mlx_chat.store.rows import Ending, Message

_GROW_SECONDS = 0.7  # between two saves of an answer under way: less than a second, whatever the timers do
_ENDINGS: dict[str, Ending] = {"stop": "complete", "length": "length", "stopped": "stopped"}


class Busy(InputError):
    """Only one answer can be under way."""


@dataclass
class UnderWay:
    """The answer under way: where it goes, how it is made, and what it says so far, with what was begun earlier."""

    conversation: int
    question: int
    answer: int
    settings: Settings
    text: str = ""
    begun: tuple[str, list[int] | None] | None = None
    earlier_tokens: int = 0
    submitted: bool = False
    saved: float = 0.0


class Session:
    """The conversation that is shown, and the answer under way.

    settings      what the next answers are made with; those of a conversation are kept with it
    ready         the model, once it is loaded
    seen          where its cache stands
    conversation  the one shown; None: a new one, which begins with its first question
    line          ids of its messages, from the first to the last of the branch shown
    """

    def __init__(self, store: Store, engine: Engine, settings: Settings) -> None:
        self.store = store
        self.settings = settings
        self.ready: Ready | None = None
        self.seen = Seen(0, 0)
        self.conversation: int | None = None
        self.line: list[int] = []
        self.under_way: UnderWay | None = None
        self.schema: Mapping[str, Any] | None = None  # JSON that every answer must fit
        self._unsaved: list[Callable[[], None]] = []
        self._engine = engine
        self._defaults = settings

    # --- what is shown ----------------------------------------------------------------------------------

    def new(self) -> None:
        """Begin a new conversation, with the settings that the program was started with and the model of now."""
        self.conversation, self.line = None, []
        self.settings = self._fresh()

    def open(self, conversation: int) -> None:
        """Show a conversation, with its own settings."""
        head = self.store.conversation(conversation)
        self.conversation = conversation
        self.line = self.store.shown(head)
        own = known(head.settings, ANSWER) | {"system": head.system}
        self.settings = self._fresh().changed(own)

    def show(self, message: int) -> None:
        """Show the conversation and the branch that a message is in."""
        conversation = self.store.message(message).conversation
        if conversation != self.conversation:
            self.open(conversation)
        if message not in self.line:
            self.line = self.store.line(self.store.switch(conversation, message))

    def configure(self, settings: Settings) -> None:
        """Make the next answers with other settings; they are kept with the conversation."""
        self.settings = settings
        if self.conversation is not None:
            values = settings.given(ANSWER)
            self.store.configure(
                self.conversation, model=settings.model, system=values.pop("system", ""), settings=values
            )

    # --- asking -----------------------------------------------------------------------------------------

    def ask(self, text: str) -> UnderWay:
        """Ask a question after what is shown."""
        return self._ask(text, self.line[-1] if self.line else None)

    def edit(self, question: int, text: str) -> UnderWay:
        """Ask a question in the place of another, which stays as another branch."""
        return self._ask(text, self._question(question).parent)

    def retry(self, message: int | None = None) -> UnderWay:
        """Answer a question once more: that of an answer, or the last one."""
        return self._again(self._question(message).id, self.settings)

    def replay(self, answer: int | None = None) -> UnderWay:
        """Answer the question of an answer, or the last one, once more: with the same settings and the same seed."""
        if answer is None:
            answer = self.line[-1] if self.line else self._question(None).id  # raises
        message = self.store.message(answer)
        made_with = known(message.settings, ANSWER)
        return self._again(self._question(answer).id, Settings(model=self.settings.model).changed(made_with))

    def resume(self) -> UnderWay:
        """Go on with the last answer, which was broken off. Raises InputError if there is none."""
        self._check_free()
        last = self.store.message(self.line[-1]) if self.line else None
        if (
            last is None
            or last.role != "assistant"
            or last.status in ("complete", "answering")
            or last.parent is None
        ):
            raise InputError("the last answer is complete: there is nothing to go on with; ask for more, or /retry")
        settings = Settings(model=self.settings.model).changed(known(last.settings, ANSWER))
        self.store.resume(last.id)
        under_way = UnderWay(last.conversation, last.parent, last.id, settings, last.text)
        under_way.begun = (last.text, self._ids(last)) if last.text else None
        under_way.earlier_tokens = int(last.statistics.get("generated_tokens", 0))
        return self._begin(under_way)

    def stop(self) -> None:
        """End the answer under way; what it says so far is kept."""
        if self.under_way is None:
            return
        if self.under_way.submitted:
            self._engine.cancel()
        else:  # no model yet
            self._finish("stopped", {})

    def switch(self, message: int, step: int) -> None:
        """Show another of the messages in the place of one: the next (1) or the one before (-1)."""
        siblings = [sibling.id for sibling in self.store.siblings(message)]
        place = siblings.index(message) + step
        if 0 <= place < len(siblings):
            conversation = self.store.message(message).conversation
            self.line = self.store.line(self.store.switch(conversation, siblings[place]))

    def fork(self, message: int) -> int:
        """Copy all up to a message into a new conversation, and show that."""
        conversation = self.store.fork(message)
        self.open(conversation)
        return conversation

    def message(self, message: int) -> Message:
        """A message as it stands: of the answer under way with all that it says by now."""
        found = self.store.message(message)
        under_way = self.under_way
        return replace(found, text=under_way.text) if under_way and under_way.answer == message else found

    # --- what the engine says ---------------------------------------------------------------------------

    def handle(self, event: Event) -> None:
        """Keep what an event brings."""
        match event:
            case Ready():
                self.ready, self.seen = event, Seen(0, 0)
                if self.under_way is not None and not self.under_way.submitted:
                    self._submit(self.under_way)
            case Text(text, _, seen):
                self.seen = seen or self.seen
                if self.under_way is not None:
                    self.under_way.text += text
                    if time.monotonic() - self.under_way.saved > _GROW_SECONDS:
                        self.store.grow(self.under_way.answer, self.under_way.text)
                        self.under_way.saved = time.monotonic()
            case Done():
                self.seen = event.seen
                self._done(event)
            case Failed(message, fatal):
                if fatal:
                    self.ready = None
                if self.under_way is not None and (fatal or self.under_way.submitted):
                    self._finish("error", {"error": message})
            case _:
                pass

    def _done(self, done: Done) -> None:
        if self.under_way is None:
            return
        begun_text, begun_ids = self.under_way.begun or ("", [])
        self.under_way.text = begun_text + done.text
        statistics = asdict(done.statistics) | {"seen": done.seen.tokens, "cache_bytes": done.seen.cache_bytes}
        statistics["generated_tokens"] += self.under_way.earlier_tokens
        if self.ready is not None:
            statistics["vocabulary"] = self.ready.vocabulary
        self._finish(_ENDINGS[done.reason], statistics, None if begun_ids is None else [*begun_ids, *done.ids])

    def _finish(self, status: Ending, statistics: dict[str, Any], ids: list[int] | None = None) -> None:
        assert self.under_way is not None
        under_way, self.under_way = self.under_way, None
        self._unsaved.append(lambda: self.store.finish(under_way.answer, status, under_way.text, statistics, ids))
        self.save_again()

    def save_again(self) -> None:
        """Save answers that have ended but could not be saved (the disk was full, say). Raises as the store does."""
        while self._unsaved:
            self._unsaved[0]()
            self._unsaved.pop(0)

    # --- to the engine ----------------------------------------------------------------------------------

    def _ask(self, text: str, parent: int | None) -> UnderWay:
        self._check_free()
        settings, values = self._drawn(self.settings)
        asked = self.store.ask(
            self.conversation, parent, text, model=settings.model, system=settings.system, settings=values
        )
        if self.conversation is None:
            self.conversation = asked.conversation
            self.configure(self.settings)
        return self._begin(UnderWay(asked.conversation, asked.question, asked.answer, settings))

    def _again(self, question: int, settings: Settings) -> UnderWay:
        self._check_free()
        settings, values = self._drawn(settings)
        answer = self.store.again(question, model=settings.model, system=settings.system, settings=values)
        return self._begin(UnderWay(self.store.message(answer).conversation, question, answer, settings))

    def _begin(self, under_way: UnderWay) -> UnderWay:
        self.conversation, self.under_way = under_way.conversation, under_way
        self.line = self.store.line(under_way.answer)
        if self.ready is not None:
            self._submit(under_way)
        return under_way

    def _submit(self, under_way: UnderWay) -> None:
        settings = under_way.settings
        under_way.submitted, under_way.saved = True, time.monotonic()
        text, ids = under_way.begun or ("", None)
        self._engine.submit(
            Request(
                self.history(under_way.question, settings.system),
                settings.sampling,
                settings.max_tokens,
                settings.stop,
                continues=text if ids is None else ids,
                schema=self.schema,
            )
        )

    def history(self, question: int, system: str) -> list[dict[str, Any]]:
        """The messages up to a question, as the model is given them; questions without an answer are left out."""
        messages: list[dict[str, Any]] = [{"role": "system", "content": system}] if system else []
        branch = self.store.branch(question)
        for message, following in zip(branch, [*branch[1:], None], strict=True):
            unanswered = following is not None and following.role == "assistant" and not following.text
            if message.role == "user" and not unanswered:
                messages.append({"role": "user", "content": message.text})
            elif message.role == "assistant" and message.text:
                ids = self._ids(message)
                messages.append(
                    {"role": "assistant", "content": message.text} | ({"ids": ids} if ids is not None else {})
                )
        return messages

    def _ids(self, message: Message) -> list[int] | None:
        """The ids of an answer, if they mean the same to the model of now."""
        ours = self.ready is not None and message.statistics.get("vocabulary") == self.ready.vocabulary
        return message.ids if ours else None

    def _question(self, message: int | None) -> Message:
        """A question: the message itself, the one it answers, or the last one."""
        if message is None:
            if not self.line:
                raise InputError("nothing has been asked yet")
            message = self.line[-1]
        found = self.store.message(message)
        if found.role == "user":
            return found
        if found.parent is None:
            raise InputError("this answer has no question")
        return self.store.message(found.parent)

    def _fresh(self) -> Settings:
        """What the program was started with; model and engine are those of now."""
        return replace(self._defaults, **{name: getattr(self.settings, name) for name in ("model", *ENGINE)})

    def _check_free(self) -> None:
        if self.under_way is not None:
            raise Busy("the model is still answering: Esc stops it")

    @staticmethod
    def _drawn(settings: Settings) -> tuple[Settings, dict[str, Any]]:
        """With a seed, so that the answer can be made again; and as values, for the store."""
        if settings.seed is None and settings.temperature > 0:
            settings = replace(settings, seed=secrets.randbits(32))
        values = settings.given(ANSWER)
        values.pop("system", None)
        return settings, values
