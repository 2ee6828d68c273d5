"""From the command line to the chat on the screen, and back to the terminal with nothing lost."""

from __future__ import annotations

import contextlib
import gc
import logging
import os
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from m7mlx.command import EXIT_FAILED
from m7mlx.errors import InputError, M7Error, RunError
from m7mlx_chat.app import ChatApp
from m7mlx_chat.borrowed import BorrowedEngine
from m7mlx_chat.catalog import on_this_machine
from m7mlx_chat.config import Config
from m7mlx_chat.engine import Engine
from m7mlx_chat.environment import Environment
from m7mlx_chat.events import AnyEngine
from m7mlx_chat.session import Session
from m7mlx_chat.settings import Settings
from m7mlx_chat.store import open_store
from m7mlx_chat.tools.allowed import Allowed
from m7mlx_chat.tools.start import start_tools
from m7mlx_chat.view import Parts


@dataclass(frozen=True)
class Start:
    """What the command line wants of the chat.

    question  to be asked at once
    go_on     in the conversation spoken in last
    save      keep the conversations
    fetch     the model of the settings is wanted: where it is not here, fetch it
    notes     what is to be told at the start
    allowed   tools that may run unasked
    """

    question: str | None = None
    go_on: bool = False
    save: bool = True
    fetch: bool = False
    notes: Sequence[str] = ()
    allowed: Sequence[str] = ()


def launch(config: Config, settings: Settings, environment: Environment, start: Start) -> int:
    """Show the chat until the user leaves; returns the exit status."""
    notes = list(start.notes)
    with open_store(environment.database if start.save else None) as store:
        engine: AnyEngine
        if environment.engine is None:
            engine = Engine(copies=environment.copies if start.save else None)
        else:
            engine = BorrowedEngine(environment.engine)
        session = Session(store, engine, settings)
        if start.go_on:
            try:
                session.open_last()
            except M7Error as error:
                notes.append(str(error))
        session.rounds = config.tool_rounds
        try:
            approvals = environment.tools if start.save else None
            session.tools = start_tools(config.servers, Allowed(start.allowed), approvals)
        except M7Error as error:
            notes.append(str(error))
        folder = _folder(settings.model)
        is_titled = config.terminal_title and not environment.in_browser
        with _stderr_to_log(environment.log), _title_kept(is_titled), _keys_from_terminal(environment):
            app = ChatApp(
                Parts(engine, session, config, environment),
                folder=folder,
                fetch=start.fetch,
                question=start.question,
                notes=notes,
            )
            keep_collections_short()
            try:
                app.run()
            finally:
                session.end()
    return _status(app)


def _status(app: ChatApp) -> int:
    """The exit status of a chat that has ended. Raises what it ended with."""
    # seen in the chat, and worth keeping when the chat has left the screen
    if app.failure is not None:
        raise (InputError if app.failure.exit_status == InputError.exit_status else RunError)(app.failure.message)
    if isinstance(app.failed, M7Error):
        raise app.failed
    if app.return_code == EXIT_FAILED:
        raise RunError(f"the interface failed; {app.log_path} says why")
    return app.return_code or 0


def _folder(name: str) -> Path | None:
    """A model's folder, if it is here; a GGUF file has one when it has been converted."""
    found = on_this_machine(name)
    return found if found is not None and found.is_dir() else None


def keep_collections_short() -> None:
    """Take all modules out of the garbage collector's sight.

    To go through them would stop the screen for 50 ms.
    """
    gc.collect()
    gc.freeze()


@contextlib.contextmanager
def _keys_from_terminal(environment: Environment) -> Iterator[None]:
    """Where the question came through a pipe, read the keys from the terminal that stdout is.

    By its own name: macOS cannot wait for input on /dev/tty.
    """
    if environment.in_browser or (sys.stdin and sys.stdin.isatty()):
        yield
        return
    before = sys.__stdin__
    with open(os.ttyname(1), encoding="utf-8") as keys:
        sys.__stdin__ = keys  # type: ignore[misc]
        try:
            yield
        finally:
            sys.__stdin__ = before  # type: ignore[misc]


@contextlib.contextmanager
def _title_kept(is_titled: bool) -> Iterator[None]:
    """Give the terminal the title that it had before, or none where it cannot keep titles."""
    _send_to_terminal("\x1b[22;0t" * is_titled)
    try:
        yield
    finally:
        _send_to_terminal("\x1b]0;\x07\x1b[23;0t" * is_titled)


def _send_to_terminal(sequence: str) -> None:
    """Send a control sequence by the stream that Textual draws through."""
    if sys.__stderr__ is not None:
        with contextlib.suppress(OSError, ValueError):  # a terminal that is gone
            sys.__stderr__.write(sequence)
            sys.__stderr__.flush()


@contextlib.contextmanager
def _stderr_to_log(path: Path) -> Iterator[None]:
    """Send what native code writes to fd 2 into a file: it would land in the middle of the chat.

    What is logged goes there too. Where the file cannot be written, the chat does without.

    Textual draws through `sys.__stderr__`. It gets the terminal that stdout is, since fd 2 may be
    redirected.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        log = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
    except OSError:
        log = os.open(os.devnull, os.O_WRONLY)
    errors, before = os.dup(2), sys.__stderr__
    handler = logging.StreamHandler(os.fdopen(log, "w", encoding="utf-8", errors="backslashreplace"))
    sys.__stderr__ = os.fdopen(os.dup(1), "w", encoding="utf-8")  # type: ignore[misc]
    logging.getLogger().addHandler(handler)
    try:
        os.dup2(log, 2)
        yield
    finally:
        logging.getLogger().removeHandler(handler)
        os.dup2(errors, 2)
        os.close(errors)
        for stream in (handler.stream, sys.__stderr__):
            with contextlib.suppress(OSError):  # a full disk, a terminal that is gone
                stream.close()
        sys.__stderr__ = before  # type: ignore[misc]
