"""What the line mode writes: answers as they come, notes in lines of their own."""

from __future__ import annotations

import sys
import time

from m7mlx.command import say
from m7mlx.terminal import visible
from m7mlx.units import counted

_FIRST_SECONDS, _NEXT_SECONDS = 3.0, 10.0  # before the first line of progress, and between two


class Written:
    """The two streams.

    All that comes from a model or a file is made visible, into a pipe, too: whoever reads it there
    (`tee`, a log) may be a terminal.
    """

    def __init__(self) -> None:
        self._is_open = False  # a line of an answer has begun and not ended

    def answer(self, text: str) -> None:
        """Write a part of an answer on standard output."""
        text = visible(text)
        if text:
            print(text, end="", flush=True)
            self._is_open = not text.endswith("\n")

    def end_line(self) -> None:
        """End the line that an answer has begun."""
        if self._is_open:
            print(flush=True)
            self._is_open = False

    def tell(self, text: str) -> None:
        """Write a note, which may have several lines, on standard error."""
        self.end_line()
        for line in text.split("\n"):
            say(visible(line))

    def prompt(self, text: str) -> None:
        """Ask for input where the system's own line editor does not."""
        print(text, end="", flush=True, file=sys.stderr)


class Progress:
    """A line from time to time on how far a piece of work has come."""

    def __init__(self, written: Written, what: str, unit: str = "") -> None:
        """Begin; `what` is what goes on, `unit` what is counted: without one, a share is told."""
        self._written = written
        self._what = what
        self._unit = unit
        self._next = time.monotonic() + _FIRST_SECONDS

    def __call__(self, done: int, total: int) -> None:
        """Take note of how far it is."""
        if time.monotonic() < self._next or not total:
            return
        self._next = time.monotonic() + _NEXT_SECONDS
        share = f"{done:,} of {counted(total, self._unit)}" if self._unit else f"{100 * done // total} %"
        self._written.tell(f"{self._what}: {share}")
