"""Questions and answers in lines, from the start of the program to its end."""

from __future__ import annotations

import os
import re
import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import cast, get_args

from m7mlx.command import EXIT_FAILED, EXIT_INTERRUPTED
from m7mlx.errors import M7Error, RunError
from m7mlx.files.hub import find_existing
from m7mlx.units import counted
from m7mlx_chat.actions import is_command
from m7mlx_chat.attach import attached
from m7mlx_chat.config import Config
from m7mlx_chat.engine import Engine
from m7mlx_chat.environment import Environment
from m7mlx_chat.events import WORDS, Done, Event, Failed, Given, Note, Prefill, Text, Thought, Word
from m7mlx_chat.headless import ended_by_signals, fetch_models
from m7mlx_chat.plain.commands import LineCommands
from m7mlx_chat.plain.reading import Lines
from m7mlx_chat.plain.writing import Progress, Written
from m7mlx_chat.room import WAYS, is_full, summary_request
from m7mlx_chat.session import Session
from m7mlx_chat.settings import Settings
from m7mlx_chat.steps import Call
from m7mlx_chat.store import open_store
from m7mlx_chat.tools.allowed import Allowed
from m7mlx_chat.tools.start import start_tools
from m7mlx_chat.under_way import UnderWay

_WAIT = 0.1  # seconds to wait for an event at a time
_SHOWN = 200  # characters of what a tool gave
_RECALLED = 200  # questions that ↑ brings back
_MENTION = re.compile(r"(?<!\S)@(\S+)")
_ENDED = {
    "length": "cut at the longest length; /continue goes on",
    "stopped": "stopped; /continue goes on",
}


@dataclass(frozen=True)
class Start:
    """What the command line wants.

    question  to be asked at once
    go_on     in the conversation spoken in last
    save      keep the conversations
    allowed   tools that may run unasked
    notes     what is to be told at the start
    """

    question: str | None = None
    go_on: bool = False
    save: bool = True
    allowed: Sequence[str] = ()
    notes: Sequence[str] = ()


class Talk(LineCommands):
    """The loop of messages, and how an answer is printed."""

    def run(self) -> int:
        """Read and answer until the end of input; returns the exit status."""
        while not self.left:
            try:
                self._have_title_written()
                text = self.lines.message()
                self._hear()
                if text is None:
                    break
                self.take(text)
            except KeyboardInterrupt:
                if self.session.under_way is not None or not self.lines.is_terminal:
                    return EXIT_INTERRUPTED
                self.written.prompt("\n")
                self.written.tell("Ctrl-D or /bye leaves.")
        return EXIT_FAILED if self.has_failed and not self.lines.is_terminal else 0

    def _have_title_written(self) -> None:
        """Have the model write a title while a person reads and types; a question ends that."""
        if self.config.model_titles and self.lines.is_terminal:
            self.session.write_title(self.session.settings.model)

    def _hear(self) -> None:
        """Take what the engine has said since the last answer."""
        for event in self.engine.drain():
            self.session.handle(event)
            self._print(event, Progress(self.written, ""))

    def take(self, text: str) -> None:
        """Do what a message wants; what goes wrong is told."""
        offered, self.offered = self.offered, []
        text = text.strip("\n").rstrip()
        try:
            if not text.strip():
                self.offered = offered
            elif text.isdecimal() and 1 <= int(text) <= len(offered):
                offered[int(text) - 1]()
            elif is_command(text):
                self.run_command(text)
            else:
                question = self._with_files(text)
                self.answer(lambda: self.session.ask(question))
        except M7Error as error:
            self._tell_error(str(error))

    def _tell_error(self, text: str) -> None:
        self.has_failed = True
        self.written.tell(f"error: {text}")

    def _with_files(self, text: str) -> str:
        """Put the files that a message names by @ in the place of their names."""

        def content(match: re.Match[str]) -> str:
            path = find_existing(match[1])
            if path is None or (path.is_dir() and not match[1].endswith("/")):
                return match[0]
            found = attached(match[1])
            self.written.tell(f"with {path.name}: {counted(len(found), 'character')}")
            return f"\n{found}\n"

        return _MENTION.sub(content, text).strip("\n")

    # --- answering --------------------------------------------------------------------------------

    def answer(self, begin: Callable[[], UnderWay]) -> None:
        self.check_loaded()
        under_way = begin()
        if under_way.settings.temperature != self.session.settings.temperature:
            sampled = f"{under_way.settings.temperature:g}"
            self.written.tell(f"at temperature 0 it would be the same: sampled at {sampled}")
        progress, is_thinking = Progress(self.written, "reading", "token"), False
        while self.session.under_way is not None:
            for event in [*self.session.tools.drain(), *self.engine.drain(_WAIT)]:
                self.session.handle(event)
                if isinstance(event, Thought) and not is_thinking:
                    is_thinking = True
                    self.written.tell("thinking ...")
                self._print(event, progress)
                self._offer_room(event, under_way)
            if under_way.asking is not None and self.session.under_way is under_way:
                self._ask_for(under_way.asking)

    def _ask_for(self, call: Call) -> None:
        """Ask for the user's word on a call; without one the answer ends."""
        self.written.tell(f"The model calls {call.name} with {call.arguments}\n{self.session.tools.about(call)}")
        for meant, means in WORDS.items():
            self.written.tell(f"{meant}: {means}")
        try:
            word = (self.lines.message("Shall it? once, always, no, never: ") or "").strip().lower()
        except KeyboardInterrupt:
            word = ""
        if word in get_args(Word):
            self.session.decide(cast(Word, word))
        elif word:
            self.written.tell("That is none of the four.")
        else:
            self.session.stop()

    def _print(self, event: Event, progress: Progress) -> None:
        match event:
            case Prefill(done, total):
                progress(done, total)
            case Text(text):
                self.written.answer(text)
            case Given(_, outcome, result):
                self.written.tell(f"the tool gave ({outcome}): {result[:_SHOWN]}{' …' * (len(result) > _SHOWN)}")
            case Note(message):
                self.written.tell(message)
            case Done(reason):
                self.written.end_line()
                if reason in _ENDED:
                    self.written.tell(f"({_ENDED[reason]})")
            case Failed(message):
                self._tell_error(message)
            case _:
                pass

    def _offer_room(self, event: Event, full: UnderWay) -> None:
        """Offer ways to go on where the conversation has no more room."""
        if not isinstance(event, Failed) or event.room is None:
            return
        room = event.room
        self.written.tell(is_full(room))
        for number, text in enumerate(WAYS.values(), 1):
            self.written.tell(f"{number}  {text}")
        self.offered = [
            lambda: self._slide(full, room),
            lambda: self._move_on(full, summary_request(self.store, full.question, room)),
            lambda: self._move_on(full, None),
        ]

    def _slide(self, full: UnderWay, room: int) -> None:
        self.configure(self.session.settings.changed({"max_kv_size": room}))
        self.answer(self.session.resume if full.begun is not None else lambda: self.session.retry(full.question))

    def _move_on(self, full: UnderWay, summary: str | None) -> None:
        question = self.store.message(full.question).text
        self.session.new()
        if summary is not None:
            self.answer(lambda: self.session.ask(summary))
        self.answer(lambda: self.session.ask(question))


def run_lines(config: Config, settings: Settings, environment: Environment, start: Start) -> int:
    """Talk in lines until the user leaves; returns the exit status."""
    if sys.stdout is None:
        raise RunError("standard output is closed; there is nowhere to print answers")
    sys.stdout.reconfigure(encoding="utf-8", errors="replace")  # type: ignore[union-attr]
    written = Written()
    for note in start.notes:
        written.tell(note)
    with ended_by_signals((signal.SIGTERM, signal.SIGHUP)), open_store(_database(environment, start)) as store:
        lines = Lines(written, store.prompts(limit=_RECALLED))
        folder = fetch_models(settings, Progress(written, "fetching"))
        engine = Engine(copies=environment.copies if start.save else None)
        session = Session(store, engine, settings)
        session.rounds = config.tool_rounds
        approvals = environment.tools if start.save else None
        try:
            session.tools = start_tools(config.servers, Allowed(start.allowed, asks=lines.is_terminal), approvals)
        except M7Error as error:
            written.tell(str(error))
        talk = Talk(session, engine, config, environment, lines, written)
        engine.start()
        try:
            with _stopped_by_ctrl_c(session):
                return _talk(talk, folder, start)
        finally:
            session.end()
            written.end_line()


def _database(environment: Environment, start: Start) -> Path | None:
    return environment.database if start.save else None


def _talk(talk: Talk, folder: Path, start: Start) -> int:
    if start.go_on:
        talk.session.open_last()
    talk.load(folder)
    if start.question is not None:
        question = start.question
        talk.answer(lambda: talk.session.ask(question))
    if talk.lines.is_terminal:
        name = os.path.basename(talk.session.settings.model) or talk.session.settings.model
        talk.written.tell(f"{name} answers. /help shows the commands; Ctrl-D leaves.")
    return talk.run()


@contextmanager
def _stopped_by_ctrl_c(session: Session) -> Iterator[None]:
    """Let Ctrl-C stop the answer under way; a second one, or one without an answer, interrupts."""
    stopped: list[UnderWay] = []

    def stop(number: int, frame: object) -> None:
        under_way = session.under_way
        if under_way is None or under_way in stopped or under_way.asking is not None:
            raise KeyboardInterrupt
        stopped[:] = [under_way]
        session.stop()

    if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:  # nohup's wish
        yield
        return
    before = signal.signal(signal.SIGINT, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
