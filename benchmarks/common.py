"""What the benchmarks share. Each script prints one Markdown table; docs/performance.md keeps them."""

from __future__ import annotations

import platform
import statistics
from collections.abc import Callable, Mapping, Sequence
from importlib.metadata import version


def preload_blas() -> str:
    """The BLAS that MLX computes with in this process, peers' runs included; call before MLX is imported."""
    from m7mlx.cpu import blas

    return blas.library or "MLX's own"


def machine(blas: str) -> str:
    """One line that says what the figures were measured on."""
    import mlx.core as mx

    return f"{platform.system()} {platform.machine()}, MLX {version('mlx')}, {mx.default_device()}, BLAS: {blas}"


def alternate(rounds: int, runs: Mapping[str, Callable[[], float]]) -> dict[str, list[float]]:
    """Run all in turn, `rounds` times, so that a slow minute of the machine meets every one of them."""
    found: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(rounds):
        for name, run in runs.items():
            found[name].append(run())
    return found


def spread(values: Sequence[float], unit: str = "", digits: int = 2) -> str:
    """Median, and lowest to highest."""
    low, middle, high = min(values), statistics.median(values), max(values)
    return f"{middle:.{digits}f}{unit} ({low:.{digits}f}–{high:.{digits}f})"


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Print a Markdown table."""
    for row in (head, ["---"] * len(head), *rows):
        print("| " + " | ".join(row) + " |", flush=True)
