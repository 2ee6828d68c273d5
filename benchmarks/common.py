"""Shared by the benchmarks: each prints one Markdown table, which docs/performance.md keeps."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from m7mlx_bench import report
from m7mlx_bench.report import spread

__all__ = ["alternate", "machine_line", "spread", "table"]


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
