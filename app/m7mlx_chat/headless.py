"""One question, one answer: for scripts, pipes and -p.

stdout carries the answer (or JSON) and nothing else.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from m7mlx import Request
from m7mlx.command import say
from m7mlx.errors import DownloadError, InputError, RunError
from m7mlx.files.hub import ALIASES, DEMO, is_gguf, is_repo_id, resolve
from m7mlx.files.repository import Progress
from m7mlx.parallel.world import World
from m7mlx.units import counted, in_gigabytes
from m7mlx_chat.catalog import SUGGESTED, on_this_machine
from m7mlx_chat.engine import Engine
from m7mlx_chat.events import Done, Event, Failed, Text, Thought
from m7mlx_chat.printers import JsonPrinter, Printer, TextPrinter
from m7mlx_chat.servers import ROUNDS, Server
from m7mlx_chat.session import Session
from m7mlx_chat.settings import Settings
from m7mlx_chat.store import open_store
from m7mlx_chat.tools.allowed import Allowed
from m7mlx_chat.tools.start import start_tools

_ENDING = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
_WAIT = 0.5  # seconds to wait for an event at a time: signals come through in between
_LOOK = 0.05  # seconds between two looks at the tools


@dataclass(frozen=True)
class Tools:
    """The servers of tools, what of them the model may call unasked, and how often."""

    servers: Sequence[Server] = ()
    allowed: Sequence[str] = ()
    rounds: int = ROUNDS


NO_TOOLS = Tools()


def answer(
    settings: Settings,
    question: str,
    database: Path | None,
    *,
    copies: Path | None = None,
    go_on: bool = False,
    as_json: bool = False,
    draws: bool = True,
    schema: Mapping[str, Any] | None = None,
    world: World | None = None,
    tools: Tools = NO_TOOLS,
) -> int:
    """Answer a question on stdout; returns the exit status.

    database  where question and answer are kept; None keeps nothing
    copies    where conversations are copied to that are gone on with; None copies none
    go_on     ask in the conversation spoken in last
    as_json   print one JSON object a line
    draws     draw bars of progress on a terminal
    schema    the answer is JSON that fits this schema
    world     the processes that share the model, of which this is the first
    tools     what the model may call

    The question is kept before the model sees it, the answer at least every second. Control
    characters are made visible where a terminal would obey them; into a pipe the text goes as it
    is.
    """
    if sys.stdout is None:  # closed by whoever started us
        raise RunError("standard output is closed; there is nowhere to print the answer")
    sys.stdout.reconfigure(encoding="utf-8", errors="replace")  # type: ignore[union-attr]
    folder = fetch_models(settings)
    with ended_by_signals(), open_store(database) as store:
        engine = Engine(world, copies if go_on else None)
        session = Session(store, engine, settings)
        session.schema, session.rounds = schema, tools.rounds
        if go_on:
            session.open_last()
        session.tools = start_tools(tools.servers, Allowed(tools.allowed, asks=False), None)
        engine.start()
        try:
            engine.load(folder, settings)
            while not session.tools.is_settled:
                time.sleep(_LOOK)
            session.tools.check()
            under_way = session.ask(question)
            printer: Printer = JsonPrinter() if as_json else TextPrinter(draws=draws)
            printer.start(under_way.conversation, settings.model)
            with printer:
                try:
                    _print(session, engine, printer)
                except (KeyboardInterrupt, SystemExit):
                    session.stop()
                    _print(session, engine, printer)  # what was said by then
                    raise
        finally:
            session.stop()
            # nobody reads any more, say: keep what there is
            for event in _until_done(session, engine):
                session.handle(event)
            session.tools.close()
            engine.close()
    return 0


def fill_in(settings: Settings, prefix: str, suffix: str, *, as_json: bool = False) -> int:
    """Write what stands between two texts on stdout; returns the exit status. Nothing is kept."""
    if sys.stdout is None:
        raise RunError("standard output is closed; there is nowhere to print the answer")
    sys.stdout.reconfigure(encoding="utf-8", errors="replace")  # type: ignore[union-attr]
    folder = fetch_models(settings)
    engine = Engine(None)
    with ended_by_signals():
        engine.start()
        try:
            engine.load(folder, settings)
            engine.submit(Request(prefix, settings.sampling, settings.max_tokens, settings.stop, suffix=suffix))
            printer: Printer = JsonPrinter() if as_json else TextPrinter()
            with printer:
                _print_to_end(engine, printer)
        finally:
            engine.cancel()
            engine.close()
    return 0


def _print_to_end(engine: Engine, printer: Printer) -> None:
    while True:
        for event in engine.drain(_WAIT):
            printer.show(event)
            if isinstance(event, Failed):
                raise (InputError if event.exit_status == InputError.exit_status else RunError)(event.message)
            if isinstance(event, Done):
                return


@contextmanager
def ended_by_signals(numbers: Sequence[signal.Signals] = _ENDING) -> Iterator[None]:
    """Let these signals end it as Ctrl-C does, and a second one at once."""

    def at_once(number: int, _: object) -> None:
        os._exit(128 + number)

    def end(number: int, _: object) -> None:
        for other in before:
            signal.signal(other, at_once)
        raise KeyboardInterrupt if number == signal.SIGINT else SystemExit(128 + number)

    heard = [n for n in numbers if signal.getsignal(n) != signal.SIG_IGN]
    before = {number: signal.signal(number, end) for number in heard}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _print(session: Session, engine: Engine, printer: Printer) -> None:
    begun = False
    for event in _until_done(session, engine):
        session.handle(event)
        printer.show(event)
        begun = begun or isinstance(event, Text | Thought)
        if isinstance(event, Failed):
            # What fails on the way, though it be for the schema's sake, is a run that failed.
            error = InputError if event.exit_status == InputError.exit_status and not begun else RunError
            raise error(event.message)
        if isinstance(event, Done) and event.reason == "length" and session.schema is not None:
            _check_whole(event)


def _check_whole(done: Done) -> None:
    """Raise RunError for JSON that was cut off: whoever asked for JSON gets JSON, or an error."""
    try:
        json.loads(done.text)
    except (ValueError, RecursionError):
        count = done.statistics.generated_tokens
        tokens = f"{counted(count, 'token')} {'was' if count == 1 else 'were'}"
        raise RunError(f"{tokens} not enough for the whole JSON; allow more with --max-tokens") from None


def _until_done(session: Session, engine: Engine) -> Iterator[Event]:
    while (under_way := session.under_way) is not None:
        yield from session.tools.drain()
        yield from engine.drain(_LOOK if under_way.waits else _WAIT)


def fetch_model(model: str, progress: Progress | None = None) -> Path:
    """Find a model's folder; before a download, say so.

    Progress goes to `progress`, or is drawn on stderr.
    """
    if on_this_machine(model) is None and (model in (DEMO, *ALIASES) or is_repo_id(model) or is_gguf(model)):
        sizes = [f" ({in_gigabytes(entry.nbytes)})" for entry in SUGGESTED if entry.name == model]
        say(f"{model} is not on this machine: it is fetched now{''.join(sizes)}; Ctrl-C stops that")
    return resolve(model, progress=progress)


def fetch_models(settings: Settings, progress: Progress | None = None) -> Path:
    """Find the folder of the model. It is fetched, with the draft model, if it is not here."""
    try:
        if settings.speculate not in ("off", "lookup"):
            fetch_model(settings.speculate, progress)
        return fetch_model(settings.model, progress)
    except DownloadError as error:
        if settings.model == DEMO:
            raise
        raise DownloadError(f"{error}; or try the small model: m7mlx-chat --model demo") from None
