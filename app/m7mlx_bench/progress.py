"""What a run is doing, on stderr: one line that changes in a terminal, or a line at times."""

from __future__ import annotations

import os
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from m7mlx.terminal import console, one_line

_EVERY = 5.0  # seconds between two lines, at the least
_STILL = 60.0  # seconds until a line says that nothing has changed

Show = Callable[[str], None]


@contextmanager
def show_progress(prog: str, is_shown: bool = True) -> Iterator[Show]:
    """Give the function that takes what the run turns to."""
    if not is_shown:
        yield lambda text: None
    elif sys.stderr.isatty() and os.environ.get("TERM") not in ("dumb", "unknown"):
        with _live() as show:
            yield show
    else:
        with _lines(prog) as show:
            yield show


@contextmanager
def _live() -> Iterator[Show]:
    # Where nobody looks, nothing is drawn.
    from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

    columns = (SpinnerColumn(), TimeElapsedColumn(), TextColumn("{task.description}", markup=False))
    with Progress(*columns, console=console(stderr=True), transient=True) as progress:
        task = progress.add_task("starting", total=None)
        yield lambda text: progress.update(task, description=one_line(text))


@contextmanager
def _lines(prog: str) -> Iterator[Show]:
    """Print what is new, not too often; and at times that the same goes on."""
    began = last = time.monotonic()
    newest, printed = "", ""
    lock, over = threading.Lock(), threading.Event()

    def print_due() -> None:
        nonlocal last, printed
        with lock:
            now = time.monotonic()
            if now - last >= (_STILL if newest == printed else _EVERY if printed else 0) and newest:
                minutes, seconds = divmod(int(now - began), 60)
                print(f"{prog}: {minutes}:{seconds:02} {newest}", file=sys.stderr, flush=True)
                last, printed = now, newest

    def watch() -> None:
        while not over.wait(1):
            print_due()

    def show(text: str) -> None:
        nonlocal newest
        newest = one_line(text)
        print_due()

    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    try:
        yield show
    finally:
        over.set()
        watcher.join()
