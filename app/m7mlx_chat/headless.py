"""One question, one answer: for scripts, pipes and -p. stdout carries the answer and nothing else."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING

from m7mlx.errors import InputError, RunError
from m7mlx_chat.settings import Settings
from m7mlx_chat.terminal import visible

if TYPE_CHECKING:
    from m7mlx import Piece


def answer(settings: Settings, prompt: str | None) -> int:
    """Answer `prompt`, with what is piped in after it, on stdout; returns the exit status.

    Control characters are made visible where a terminal would obey them; into a pipe the text goes as it is.
    """
    question = _question(prompt)
    if sys.stdout is None:  # closed by whoever started us
        raise RunError("standard output is closed; there is nowhere to print the answer")
    folder = settings.folder()
    stream = _start(settings, folder, question)
    on_terminal = sys.stdout.isatty()
    sys.stdout.reconfigure(encoding="utf-8", errors="replace")  # type: ignore[union-attr]
    try:
        for piece in stream:
            print(visible(piece.text) if on_terminal else piece.text, end="", flush=True)
    except KeyboardInterrupt:
        print(flush=True)  # what was answered so far stays, as a whole line
        raise
    print(flush=True)
    if sys.stderr.isatty() and piece.stats:
        s = piece.stats
        print(
            f"{s.generated_tokens} tokens · {s.generation_tps:.1f} tok/s · first after {s.time_to_first_token:.2f} s",
            file=sys.stderr,
        )
    return 0


def _start(settings: Settings, folder: Path, question: str) -> Iterator[Piece]:
    """Load the model and read the question, with a progress bar if stderr is a terminal; then the answer's pieces."""
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

    from m7mlx import load, stream_generate

    columns = (TextColumn("{task.description}"), BarColumn(), TimeRemainingColumn())
    bar = Progress(*columns, console=Console(stderr=True), disable=not sys.stderr.isatty(), transient=True)
    with bar:
        loading = bar.add_task("Loading the model", total=None)
        model, tokenizer = load(folder, progress=lambda done, total: bar.update(loading, completed=done, total=total))
        drafter = settings.drafter(model, tokenizer)
        reading = bar.add_task("Reading the question", total=None)
        stream = stream_generate(
            model,
            tokenizer,
            settings.messages([{"role": "user", "content": question}]),
            cache=model.new_cache(**settings.cache),
            drafter=drafter,
            sampling=settings.sampling,
            max_tokens=settings.max_tokens,
            stop=settings.stop,
            on_prefill=lambda done, total: bar.update(reading, completed=done, total=total),
        )
        first = next(stream)  # there is always a piece: the last one carries the statistics
    return chain([first], stream)


def _question(prompt: str | None) -> str:
    """The question from -p and from standard input. Raises InputError if there is none."""
    piped = ""
    if sys.stdin is not None and (prompt is None or (not sys.stdin.isatty() and _has_input())):
        piped = sys.stdin.buffer.read().decode("utf-8", "replace")
    question = "\n\n".join(part for part in (prompt or "", piped.strip("\n")) if part.strip())
    if not question:
        raise InputError('there is no question; give one with -p "…" or pipe it in')
    return question


def _has_input() -> bool:
    """Whether standard input is a pipe or a file: a terminal's absence alone (cron, ssh -n) is no question."""
    import os
    import stat

    try:
        mode = os.fstat(sys.stdin.fileno()).st_mode
    except (OSError, ValueError):
        return False
    return stat.S_ISFIFO(mode) or stat.S_ISREG(mode) or stat.S_ISSOCK(mode)
