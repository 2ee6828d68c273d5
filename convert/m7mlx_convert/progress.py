"""Notes, progress and results of a long run: as text, as JSON, or quietly."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Literal

from m7mlx.terminal import console, one_line, print_event

if TYPE_CHECKING:
    from rich.console import RenderableType

Style = Literal["text", "json", "quiet"]
_EVERY = 0.5  # seconds between two progress events
_LINE_EVERY = 10.0  # seconds between two lines


class Reporter:
    """Tells notes, progress and results, in a style.

    text   notes on stderr, and progress: a bar in a terminal that can draw one, or a line at times
    json   one object a line on stdout: {"event": "note" | "progress" | …}
    quiet  nothing but results
    """

    def __init__(self, style: Style = "quiet") -> None:
        self.style = style

    def note(self, text: str) -> None:
        """Tell something that the user should know."""
        if self.style == "json":
            self.event("note", text=text)
        elif self.style == "text":
            print(f"note: {one_line(text)}", file=sys.stderr)

    def event(self, kind: str, **fields: Any) -> None:
        """Write an object in the style "json", nothing in the others."""
        if self.style == "json":
            print_event(kind, **fields)

    def result(self, kind: str, shown: RenderableType, **fields: Any) -> None:
        """Write what the user asked for on stdout, as text or as an object."""
        if self.style == "json":
            self.event(kind, **fields)
            return
        if isinstance(shown, str):
            print(shown)
            return
        console(soft_wrap=True).print(shown)

    @contextmanager
    def task(
        self,
        label: str,
        total: int,
        unit: Literal["bytes", "tokens"] = "bytes",
    ) -> Iterator[Callable[[int], None]]:
        """Show the progress of a task; gives the function that takes each count done."""
        if self.style == "json":
            yield self._json_task(label, total, unit)
        elif self.style == "text":
            if sys.stderr.isatty() and os.environ.get("TERM") not in ("dumb", "unknown"):
                with _bar(label, total, unit) as advance:
                    yield advance
            else:
                yield _lines(label, total)
        else:
            yield lambda count: None

    def _json_task(self, label: str, total: int, unit: str) -> Callable[[int], None]:
        done, last = 0, 0.0

        def advance(count: int) -> None:
            nonlocal done, last
            done += count
            now = time.monotonic()
            if done >= total or now - last >= _EVERY:
                last = now
                self.event("progress", task=label, done=done, total=total, unit=unit)

        return advance


def _lines(label: str, total: int) -> Callable[[int], None]:
    """Write lines on stderr for a log; none where all is done before the first is due."""
    done, last = 0, time.monotonic()

    def advance(count: int) -> None:
        nonlocal done, last
        done += count
        if time.monotonic() - last >= _LINE_EVERY:
            last = time.monotonic()
            print(f"{label}: {done / max(total, 1):.0%}", file=sys.stderr, flush=True)

    return advance


@contextmanager
def _bar(label: str, total: int, unit: str) -> Iterator[Callable[[int], None]]:
    # Quiet runs and programs do without it.
    from rich.progress import (
        BarColumn,
        DownloadColumn,
        MofNCompleteColumn,
        Progress,
        ProgressColumn,
        TextColumn,
        TimeRemainingColumn,
        TransferSpeedColumn,
    )

    counts: tuple[ProgressColumn, ...] = (DownloadColumn(), TransferSpeedColumn())
    if unit == "tokens":
        counts = (MofNCompleteColumn(),)
    columns = (TextColumn("{task.description}", markup=False), BarColumn(), *counts, TimeRemainingColumn())
    with Progress(*columns, console=console(stderr=True), transient=True) as progress:
        task = progress.add_task(label, total=total)
        yield lambda count: progress.advance(task, count)
