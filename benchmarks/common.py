"""Shared by the benchmarks: each prints one Markdown table, which docs/performance.md keeps."""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager

from m7mlx_bench import report
from m7mlx_bench.report import spread

__all__ = ["alternate", "machine_line", "serving", "spread", "table"]


def machine_line() -> str:
    """Describe what the figures were measured on."""
    return report.machine_line(report.machine_facts())


def alternate(rounds: int, runs: Mapping[str, Callable[[], float]]) -> dict[str, list[float]]:
    """Run all in turn, `rounds` times, so that a slow minute of the machine meets every one."""
    found: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(rounds):
        for name, run in runs.items():
            found[name].append(run())
    return found


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Print a Markdown table."""
    for row in (head, ["---"] * len(head), *rows):
        print("| " + " | ".join(row) + " |", flush=True)


@contextmanager
def serving(*options: str) -> Iterator[tuple[str, int]]:
    """Start m7mlx-serve on a free port, yield its address and its process’s number, and end it.

    Raises SystemExit if it does not start, or does not end well.
    """
    command = [sys.executable, "-m", "m7mlx_serve", "--port", "0", *options]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    assert process.stderr
    try:
        for line in process.stderr:
            if found := re.search(r"http://\S+", line):
                yield found[0], process.pid
                break
        else:
            raise SystemExit("the server did not start")
    finally:
        process.terminate()
        with process.stderr:
            print(process.stderr.read(), end="", file=sys.stderr)
        if process.wait(60):
            raise SystemExit(f"the server has ended with {process.returncode}")
