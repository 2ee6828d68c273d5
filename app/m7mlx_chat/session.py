"""The conversation that is shown, and what is asked in it: no word is shown that is not kept.

    session.ask("Hello")              stores the question, then asks the engine
    session.handle(event)             stores what comes, at least every second
    session.line                      ids of the messages shown, from the first to the last

While one conversation is being answered, another may be read.
"""

from __future__ import annotations

import secrets
from dataclasses import replace
from typing import Any

from m7mlx.errors import InputError
from m7mlx_chat.answering import Answering
from m7mlx_chat.events import AnyEngine, Event, Seen
from m7mlx_chat.settings import ANSWER, ENGINE, Settings, known
from m7mlx_chat.steps import closed, values_of
from m7mlx_chat.store import Store
from m7mlx_chat.store.rows import Message
from m7mlx_chat.under_way import UnderWay

SAMPLED = 0.7  # the temperature of another answer, where at 0 it would be the same
_LOOKED_BACK = 6  # messages from the end, for one that says how much was seen


class Session(Answering):
    """The conversation that is shown, and the answer under way.

    settings      what the next answers are made with; those of a conversation are kept with it
    conversation  the one shown; None: a new one, which begins with its first question
    line          ids of its messages, from the first to the last of the branch shown
    """

    def __init__(self, store: Store, engine: AnyEngine, settings: Settings) -> None:
        super().__init__(store, engine)
        self.settings = settings
        self.conversation: int | None = None
        self.line: list[int] = []
        self._defaults = settings
        self._seen_to: int | None = None  # the message that `_seen_there` was looked up for
        self._seen_there = Seen(0, 0)

    # --- what is shown ----------------------------------------------------------------------------

    @property
    def seen_here(self) -> Seen:
        """How much of the conversation shown the model has seen, by its last answer."""
        if self.under_way is not None and self.under_way.conversation == self.conversation:
            return self.seen
        end = self.line[-1] if self.line else None
        if end != self._seen_to:
            self._seen_to, self._seen_there = end, Seen(0, 0)
            for message in reversed(self.store.read(self.line[-_LOOKED_BACK:])):
                if message.role == "assistant" and (tokens := message.statistics.get("seen")):
                    size = message.statistics.get("cache_bytes", 0)
                    self._seen_there = Seen(int(tokens), int(size))
                    break
        return replace(self._seen_there, kept_bytes=self.seen.kept_bytes)

    @property
    def unread(self) -> int:
        """About how many tokens of the conversation shown must be read again before it goes on."""
        here = self.conversation
        if here is None or here in self.in_memory:
            return 0
        is_on_disk = self.on_disk is not None and str(here) in self.on_disk.spaces
        return 0 if is_on_disk else self.seen_here.tokens

    def new(self) -> None:
        """Begin a new conversation, with the settings of the start and the model of now."""
        self.conversation, self.line = None, []
        self.settings = self._fresh()

    def open(self, conversation: int) -> None:
        """Show a conversation, with its own settings."""
        head = self.store.conversation(conversation)
        self.conversation = conversation
        self.line = self.store.shown(head)
        own = known(head.settings, ANSWER) | {"system": head.system}
        self.settings = self._fresh().changed(own)

    def open_last(self) -> None:
        """Show the conversation spoken in last; a new one begins where there is none."""
        last = self.store.conversations(limit=1)
        if last:
            self.open(last[0].id)

    def show(self, message: int) -> None:
        """Show the conversation and the branch that a message is in."""
        conversation = self.store.message(message).conversation
        if conversation != self.conversation:
            self.open(conversation)
        if message not in self.line:
            self.line = self.store.line(self.store.switch(conversation, message))

    def switch(self, message: int, direction: int) -> None:
        """Show another version of a message: the next one (1), or the one before (-1)."""
        versions = [version.id for version in self.store.siblings(message)]
        place = versions.index(message) + direction
        if 0 <= place < len(versions):
            conversation = self.store.message(message).conversation
            self.line = self.store.line(self.store.switch(conversation, versions[place]))

    def fork(self, message: int) -> int:
        """Copy all up to a message into a new conversation, and show that; returns its id."""
        conversation = self.store.fork(message)
        self.open(conversation)
        return conversation

    def message(self, message: int) -> Message:
        """A message as it stands: the answer under way comes with all that it says by now."""
        found = self.store.message(message)
        under_way = self.under_way
        if under_way is None or under_way.answer != message:
            return found
        now = {"thought": under_way.thought, "steps": values_of(under_way.steps)}
        return replace(found, text=under_way.text, statistics=found.statistics | now)

    def handle(self, event: Event) -> None:
        super().handle(event)
        if self.under_way is None:
            self._seen_to = None  # an answer has ended: what is stored of it has changed

    @property
    def branch(self) -> list[Message]:
        """The messages shown, as they are stored."""
        return self.store.branch(self.line[-1]) if self.line else []

    @property
    def last_question(self) -> Message | None:
        """The question that the messages shown end with, answered or not."""
        return next((m for m in reversed(self.store.read(self.line[-2:])) if m.role == "user"), None)

    def delete(self, conversation: int) -> str:
        """Delete a conversation, and what lies of it on the disk; returns its title."""
        title = self.store.conversation(conversation).title
        self.store.delete(conversation)
        self._engine.forget(conversation)
        return title

    def configure(self, settings: Settings) -> None:
        """Make the next answers with other settings; they are kept with the conversation."""
        self.settings = settings
        if self.conversation is not None:
            values = _values(settings)
            self.store.configure(self.conversation, model=settings.model, system=settings.system, settings=values)

    # --- asking -----------------------------------------------------------------------------------

    def ask(self, text: str) -> UnderWay:
        """Ask a question after what is shown."""
        return self._ask(text, self.line[-1] if self.line else None)

    def ask_in(self, conversation: int | None, text: str) -> UnderWay:
        """Ask a question at the end of a conversation; another one may be shown, and stays so.

        conversation  None begins one
        """
        if conversation == self.conversation:
            return self.ask(text)
        self.check_free()
        shown = self.conversation, self.line, self.settings
        try:
            if conversation is None:
                self.new()
            else:
                self.open(conversation)
            return self.ask(text)
        finally:
            self.conversation, self.line, self.settings = shown

    def edit(self, question: int, text: str) -> UnderWay:
        """Ask a question in the place of another, which stays as another version."""
        return self._ask(text, self._question(question).parent)

    def retry(self, message: int | None = None) -> UnderWay:
        """Answer a question once more: that of an answer, or the last one.

        At temperature 0 a whole answer would come once more as it is: then another is sampled, with
        a temperature of its own.
        """
        question, settings = self._question(message).id, self.settings
        if settings.temperature == 0 and any(self._is_whole(m, settings) for m in self.store.answers(question)):
            settings = replace(settings, temperature=SAMPLED)
        return self._again(question, settings)

    def _is_whole(self, answer: Message, settings: Settings) -> bool:
        """Whether an answer is all that a model says with some settings."""
        made_with = Settings().changed(known(answer.settings, ANSWER))
        same = replace(made_with, seed=None).given(ANSWER) == replace(settings, seed=None).given(ANSWER)
        return same and answer.model == settings.model and answer.status in ("complete", "length")

    def replay(self, answer: int | None = None) -> UnderWay:
        """Answer a question once more, with the settings and the seed of an answer."""
        if answer is None:
            answer = self.line[-1] if self.line else self._question(None).id  # raises
        message = self.store.message(answer)
        made_with = known(message.settings, ANSWER)
        return self._again(self._question(answer).id, Settings(model=self.settings.model).changed(made_with))

    def write(self, message: int | None, text: str) -> int:
        """Put the user's words in the place of an answer, which stays as another version.

        message  an answer, or its question; None: the last one
        Returns the new answer, which `resume` goes on with.
        """
        self.check_free()
        question, settings = self._question(message), self.settings
        before = [] if message is None else self.store.message(message).steps  # the calls that it rests on
        written = self.store.write(
            question.id,
            text,
            model=settings.model,
            system=settings.system,
            settings=_values(settings),
            statistics={"steps": values_of(before)} if before else {},
        )
        self.conversation = question.conversation
        self.line = self.store.line(written)
        return written

    def begin_with(self, text: str) -> UnderWay:
        """Answer the last question once more, beginning with a text. Raises InputError for none."""
        if not text.strip():
            raise InputError("/begin needs the words that the answer is to begin with")
        self.write(None, text)
        return self.resume()

    def resume(self) -> UnderWay:
        """Go on with the last answer, which was broken off. Raises InputError if there is none."""
        self.check_free()
        last = self.store.message(self.line[-1]) if self.line else None
        ended = last is None or last.role != "assistant" or last.status in ("complete", "answering")
        if last is None or ended or last.parent is None:
            raise InputError("the last answer is complete: there is nothing to go on with; ask for more, or /retry")
        settings = Settings(model=self.settings.model).changed(known(last.settings, ANSWER))
        self.store.resume(last.id)
        under_way = UnderWay(last.conversation, last.parent, last.id, settings, last.text)
        under_way.begun = (last.text, None) if last.text else None
        under_way.earlier_tokens = int(last.statistics.get("generated_tokens", 0))
        under_way.thought = last.thought if last.text else ""
        under_way.steps = closed(last.steps)  # a call that was left open is not made: it may be a stranger's
        return self._begin(under_way)

    def _ask(self, text: str, parent: int | None) -> UnderWay:
        self.check_free()
        settings, values = _with_seed(self.settings)
        asked = self.store.ask(
            self.conversation, parent, text, model=settings.model, system=settings.system, settings=values
        )
        if self.conversation is None:
            self.conversation = asked.conversation
            self.configure(self.settings)
        return self._begin(UnderWay(asked.conversation, asked.question, asked.answer, settings))

    def _again(self, question: int, settings: Settings) -> UnderWay:
        self.check_free()
        settings, values = _with_seed(settings)
        answer = self.store.again(question, model=settings.model, system=settings.system, settings=values)
        return self._begin(UnderWay(self.store.message(answer).conversation, question, answer, settings))

    def _begin(self, under_way: UnderWay) -> UnderWay:
        self.conversation, self.under_way = under_way.conversation, under_way
        self.line = self.store.line(under_way.answer)
        self.begin(under_way)
        return under_way

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


def _with_seed(settings: Settings) -> tuple[Settings, dict[str, Any]]:
    """Give settings a seed, so that the answer can be made again; also their values to store."""
    if settings.seed is None and settings.temperature > 0:
        settings = replace(settings, seed=secrets.randbits(32))
    return settings, _values(settings)


def _values(settings: Settings) -> dict[str, Any]:
    """What is stored of settings; the system prompt has a place of its own."""
    return {name: value for name, value in settings.given(ANSWER).items() if name != "system"}
