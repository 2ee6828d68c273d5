"""How a single answer is printed: as text, or as one JSON object a line for each event."""

from __future__ import annotations

import sys
from dataclasses import asdict
from typing import Protocol

from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeRemainingColumn

from m7mlx.terminal import console, one_line, print_event, visible
from m7mlx.units import counted
from m7mlx_chat.events import Called, Done, Event, Given, Loading, Prefill, Text, Thought


class Printer(Protocol):
    """Prints what happens. As a context it holds what has to be put in order at the end."""

    def __enter__(self) -> object: ...

    def __exit__(self, *_: object) -> None: ...

    def start(self, conversation: int, model: str) -> None:
        """Say what begins."""

    def show(self, event: Event) -> None:
        """Print an event, or nothing."""


class TextPrinter:
    """The answer as text, with progress and figures on stderr if that is a terminal."""

    def __init__(self, *, draws: bool = True) -> None:
        """Without `draws` no bar is drawn, which writes over itself."""
        columns = (TextColumn("{task.description}"), BarColumn(), TimeRemainingColumn())
        quiet = not draws or not sys.stderr.isatty()
        self._bar = Progress(*columns, console=console(stderr=True), disable=quiet, transient=True)
        self._tasks: dict[str, TaskID] = {}
        self._on_terminal = sys.stdout.isatty()
        self._answering = False

    def __enter__(self) -> None:
        self._bar.start()

    def __exit__(self, *_: object) -> None:
        self._bar.stop()
        if self._answering:
            print(flush=True)  # what was answered so far stays, as a whole line

    def start(self, conversation: int, model: str) -> None:
        """Print nothing."""

    def show(self, event: Event) -> None:
        match event:
            case Loading(done, total):
                self._progress("Loading the model", done, total)
            case Prefill(done, total):
                self._progress("Reading the question", done, total)
            case Text(text):
                self._answer(text)
            case Called():
                self._called(event)
            case Given(_, outcome, result) if outcome != "given":
                print(f"✗ {one_line(result)[:200]}", file=sys.stderr, flush=True)
            case Done():
                self._answer("")
                if sys.stderr.isatty():
                    print(flush=True)
                    self._answering = False
                    s = event.statistics
                    figures = f"{counted(s.generated_tokens, 'token')} · {s.generation_tps:.1f} tok/s"
                    print(f"{figures} · first after {s.time_to_first_token:.2f} s", file=sys.stderr)
            case _:
                pass

    def _called(self, called: Called) -> None:
        """Say on stderr what is called; what the model says next begins a paragraph."""
        self._bar.stop()
        if called.text.strip():
            print("\n", flush=True)
            self._answering = False
        for call in called.calls:
            print(f"→ {one_line(call.name)[:80]} {one_line(call.arguments)[:200]}", file=sys.stderr, flush=True)

    def _progress(self, label: str, done: int, total: int) -> None:
        if label not in self._tasks:
            self._tasks[label] = self._bar.add_task(label, total=None)
        self._bar.update(self._tasks[label], completed=done, total=total)

    def _answer(self, text: str) -> None:
        self._bar.stop()
        self._answering = True
        print(visible(text) if self._on_terminal else text, end="", flush=True)


class JsonPrinter:
    """One JSON object a line for each event."""

    def __enter__(self) -> None: ...

    def __exit__(self, *_: object) -> None: ...

    def start(self, conversation: int, model: str) -> None:
        print_event("start", conversation=conversation, model=model)

    def show(self, event: Event) -> None:
        match event:
            case Loading(done, total):
                print_event("loading", done=done, total=total)
            case Prefill(done, total, reused):
                print_event("reading", done=done, total=total, reused=reused)
            case Text(text):
                print_event("text", text=text)
            case Thought(text):
                print_event("thought", text=text)
            case Called(text, calls):
                print_event("calls", text=text, calls=[call.asked for call in calls])
            case Given(call, outcome, result):
                print_event("given", call=call, outcome=outcome, result=result)
            case Done(reason, text, _, statistics):
                print_event("done", reason=reason, text=text, statistics=asdict(statistics))
            case _:
                pass
