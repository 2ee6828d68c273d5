"""A progress bar on stderr, if that is a terminal."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from m7mlx.terminal import console


@contextmanager
def show_bar(
    label: str,
    total: int | None,
    unit: str,
    is_shown: bool = True,
) -> Iterator[Callable[[int], None]]:
    """Show a bar; gives the function that takes each count done. Without a total it only moves."""
    if not (is_shown and sys.stderr.isatty()):
        yield lambda count: None
        return
    # Where nobody looks, nothing is drawn.
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    named = TextColumn("{task.description}", markup=False)
    columns = (named, BarColumn(), MofNCompleteColumn(), TextColumn(unit), TimeRemainingColumn())
    with Progress(*columns, console=console(stderr=True), transient=True) as progress:
        task = progress.add_task(label, total=total)
        yield lambda count: progress.advance(task, count)
