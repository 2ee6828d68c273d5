"""One question, one answer: for scripts, pipes and -p. stdout carries the answer (or JSON) and nothing else."""

from __future__ import annotations

import json
import os
import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

from m7mlx.errors import InputError, RunError
from m7mlx.files.hub import DEMO, resolve
from m7mlx.parallel.launch import is_launched
from m7mlx.paths import user_path
from m7mlx.terminal import console, json_line, visible
from m7mlx_chat.events import Done, Event, Failed, Loading, Prefill, Text
from m7mlx_chat.files import attached
from m7mlx_chat.settings import Settings
from m7mlx_chat.store import Store

if TYPE_CHECKING:
    from m7mlx.parallel.world import World
    from m7mlx_chat.session import Session

_WAIT = 0.5  # seconds to wait for an event at a time: signals come through in between


def answer(
    settings: Settings,
    prompt: str | None,
    files: Sequence[str] = (),
    *,
    go_on: bool = False,
    save: bool = True,
    as_json: bool = False,
    schema: Path | None = None,
    world: World | None = None,
) -> int:
    """Answer `prompt`, with files and what is piped in after it, on stdout; returns the exit status.

    The question is kept before the model sees it, the answer at least every second. Control characters are made
    visible where a terminal would obey them; into a pipe the text goes as it is. With `schema`, a file, the answer is
    JSON that fits it. `world`, where several processes share the model, of which this is the first.
    """
    asked = question(prompt, files)
    fitting = None if schema is None else read_schema(schema)
    if sys.stdout is None:  # closed by whoever started us
        raise RunError("standard output is closed; there is nowhere to print the answer")
    sys.stdout.reconfigure(encoding="utf-8", errors="replace")  # type: ignore[union-attr]
    folder, _ = fetch(settings)
    from m7mlx_chat.engine import Engine
    from m7mlx_chat.session import Session

    with _ended_by_signals(), open_store(save) as store:
        engine = Engine(world)
        session = Session(store, engine, settings)
        session.schema = fitting
        if go_on:
            go_on_with_the_last(session)
        engine.start()
        try:
            engine.load(folder, settings)
            under_way = session.ask(asked)
            printer = _Json(sys.stdout) if as_json else _Plain()
            printer.start(under_way.conversation, settings.model)
            with printer:
                try:
                    _print(session, engine.drain, printer)
                except (KeyboardInterrupt, SystemExit):
                    session.stop()
                    _print(session, engine.drain, printer)  # what was said by then
                    raise
        finally:
            session.stop()
            if session.under_way is not None:  # nobody reads any more, say: keep what there is
                for event in _until_done(session, engine.drain):
                    session.handle(event)
            engine.close()
    return 0


@contextmanager
def _ended_by_signals() -> Iterator[None]:
    """SIGTERM and SIGHUP end it as Ctrl-C does, with what was said kept; another signal ends it at once."""

    def at_once(number: int, _: object) -> None:
        os._exit(128 + number)

    def end(number: int, _: object) -> None:
        for other in before:
            signal.signal(other, at_once)
        raise KeyboardInterrupt if number == signal.SIGINT else SystemExit(128 + number)

    heard = [n for n in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP) if signal.getsignal(n) != signal.SIG_IGN]
    before = {number: signal.signal(number, end) for number in heard}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _print(session: Session, drain: Callable[[float], list[Event]], printer: _Plain | _Json) -> None:
    begun = False
    for event in _until_done(session, drain):
        session.handle(event)
        printer.show(event)
        begun = begun or isinstance(event, Text)
        if isinstance(event, Failed):
            # What fails on the way, though it be for the schema's sake, is a run that failed.
            error = InputError if event.exit_status == InputError.exit_status and not begun else RunError
            raise error(event.message)
        if isinstance(event, Done) and event.reason == "length" and session.schema is not None:
            _check_whole(event)


def _check_whole(done: Done) -> None:
    """Whoever asked for JSON gets JSON, or an error."""
    try:
        json.loads(done.text)
    except (ValueError, RecursionError):
        tokens = done.statistics.generated_tokens
        raise RunError(f"{tokens} tokens were not enough for the whole JSON; allow more with --max-tokens") from None


def _until_done(session: Session, drain: Callable[[float], list[Event]]) -> Iterator[Event]:
    while session.under_way is not None:
        yield from drain(_WAIT)


_MOST_SCHEMA = 4 << 20  # bytes: with white space, twenty times what can be used


def read_schema(path: Path) -> dict[str, Any]:
    """A JSON schema. Raises InputError for a file that holds none."""
    try:
        with open(user_path(path), "rb") as file:
            text = file.read(_MOST_SCHEMA + 1)
        if len(text) > _MOST_SCHEMA:
            raise ValueError(f"it has more than {_MOST_SCHEMA >> 20} MB")
        schema = json.loads(text.decode("utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise InputError(f"--json-schema: {path} cannot be read ({error})") from None
    if not isinstance(schema, dict):
        raise InputError(f"--json-schema: {path} is not a JSON object")
    return schema


def fetch(settings: Settings) -> tuple[Path, Path | None]:
    """The folders of the model and of the draft model, fetched with progress on stderr where they are not here."""
    from m7mlx.errors import DownloadError

    try:
        draft = resolve(settings.speculate) if settings.speculate not in ("off", "lookup") else None
        return resolve(settings.model), draft
    except DownloadError as error:
        if settings.model == DEMO:
            raise
        raise DownloadError(f"{error}; or try the small model: m7mlx-chat --model demo") from None


@contextmanager
def open_store(save: bool) -> Iterator[Store]:
    """The conversations of the user; or, to keep nothing, an empty store that is gone afterwards."""
    if save:
        with Store() as store:
            yield store
    else:
        with TemporaryDirectory(prefix="m7mlx-chat-") as folder, Store(Path(folder) / "chats.db") as store:
            yield store


def go_on_with_the_last(session: Session) -> None:
    """Open the conversation spoken in last; a new one begins where there is none."""
    last = session.store.conversations(limit=1)
    if last:
        session.open(last[0].id)


def take_in(name: str) -> int:
    """Store the conversations of a file; returns the exit status."""
    from m7mlx_chat.portable import load_file

    with Store() as store:
        count = len(store.plant(load_file(user_path(name))))
    print(f"{count} conversation{'s' if count != 1 else ''} imported")
    return 0


class _Plain:
    """The answer as text, with progress and figures on stderr if that is a terminal."""

    def __init__(self) -> None:
        from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

        columns = (TextColumn("{task.description}"), BarColumn(), TimeRemainingColumn())
        quiet = not sys.stderr.isatty()
        self._bar = Progress(*columns, console=console(stderr=True), disable=quiet, transient=True)
        self._tasks: dict[str, Any] = {}
        self._on_terminal = sys.stdout.isatty()
        self._answering = False

    def __enter__(self) -> None:
        self._bar.start()

    def __exit__(self, *_: object) -> None:
        self._bar.stop()
        if self._answering:
            print(flush=True)  # what was answered so far stays, as a whole line

    def start(self, conversation: int, model: str) -> None: ...

    def show(self, event: Event) -> None:
        match event:
            case Loading(done, total):
                self._progress("Loading the model", done, total)
            case Prefill(done, total):
                self._progress("Reading the question", done, total)
            case Text(text):
                self._answer(text)
            case Done():
                self._answer("")
                if sys.stderr.isatty():
                    print(flush=True)
                    self._answering = False
                    s = event.statistics
                    figures = f"{s.generated_tokens} tokens · {s.generation_tps:.1f} tok/s"
                    print(f"{figures} · first after {s.time_to_first_token:.2f} s", file=sys.stderr)
            case _:
                pass

    def _progress(self, label: str, done: int, total: int) -> None:
        if label not in self._tasks:
            self._tasks[label] = self._bar.add_task(label, total=None)
        self._bar.update(self._tasks[label], completed=done, total=total)

    def _answer(self, text: str) -> None:
        self._bar.stop()
        self._answering = True
        print(visible(text) if self._on_terminal else text, end="", flush=True)


class _Json:
    """One JSON object a line for each event."""

    def __init__(self, out: Any) -> None:
        self._out = out

    def __enter__(self) -> None: ...

    def __exit__(self, *_: object) -> None: ...

    def start(self, conversation: int, model: str) -> None:
        self._write("start", conversation=conversation, model=model)

    def show(self, event: Event) -> None:
        match event:
            case Loading(done, total):
                self._write("loading", done=done, total=total)
            case Prefill(done, total, reused):
                self._write("reading", done=done, total=total, reused=reused)
            case Text(text):
                self._write("text", text=text)
            case Done(reason, text, _, statistics):
                self._write("done", reason=reason, text=text, statistics=asdict(statistics))
            case _:
                pass

    def _write(self, kind: str, **fields: Any) -> None:
        print(json_line({"event": kind} | fields), file=self._out, flush=True)


# --- the question -----------------------------------------------------------------------------------------


def question(prompt: str | None, files: Sequence[str] = ()) -> str:
    """The question from -p, from files and from standard input. Raises InputError if there is none."""
    parts = [prompt or "", *map(attached, files)]
    # mlx.launch gives its processes a pipe, and never closes it.
    if (
        not is_launched()
        and sys.stdin is not None
        and ((prompt is None and not files) or (not sys.stdin.isatty() and _has_input()))
    ):
        parts.append(sys.stdin.buffer.read().decode("utf-8", "replace").strip("\n"))
    asked = "\n\n".join(part for part in parts if part.strip())
    if not asked:
        raise InputError('there is no question; give one with -p "…" or pipe it in')
    return asked


def _has_input() -> bool:
    """Whether standard input is a pipe or a file: a terminal's absence alone (cron, ssh -n) is no question."""
    import stat

    try:
        mode = os.fstat(sys.stdin.fileno()).st_mode
    except (OSError, ValueError):
        return False
    return stat.S_ISFIFO(mode) or stat.S_ISREG(mode) or stat.S_ISSOCK(mode)
