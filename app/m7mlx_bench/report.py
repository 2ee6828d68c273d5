"""Runs → medians, spreads and ratios; as a table, as JSON."""

from __future__ import annotations

import platform
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from m7mlx.units import in_gigabytes

BASE = "mlx-lm"  # ratios are to this engine, where it ran
_PACKAGES = ("mlx", "mlx-lm", "torch", "transformers", "llama-cpp-python")


@dataclass
class Results:
    """Everything a run of m7mlx-bench found.

    runs       engine → one dictionary of figures (`m7mlx_bench.worker.measure`) per round
    bandwidth  bytes per second, per round
    notes      what makes engines hard to compare, or why one is missing
    """

    model: dict[str, Any]
    machine: dict[str, Any]
    prompts: list[int]
    positions: list[int]
    tokens: int
    runs: dict[str, list[dict[str, Any]]] = field(default_factory=dict)
    bandwidth: list[float] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def to_dict(self) -> dict[str, Any]:
        return dict(vars(self))


@dataclass(frozen=True)
class Figure:
    """One line of a table: how to read it from a run, how to print it; `better` is the side that wins."""

    name: str
    read: Callable[[Mapping[str, Any]], float | None]
    digits: int = 1
    better: str = "high"


def figures(results: Results) -> list[Figure]:
    """What the table shows, top to bottom."""
    found = [Figure("start to first token, s", lambda run: run["first_s"], 2, "low")]
    found += [
        Figure(f"prefill of {n:,}, tok/s", lambda run, n=n: run["prefill"].get(str(n)))  # type: ignore[misc]
        for n in results.prompts
    ]
    positions = sorted({*results.positions, min(results.prompts)})
    found += [
        Figure(f"decode at {n:,}, tok/s", lambda run, n=n: _per_second(run["decode"].get(str(n))))  # type: ignore[misc]
        for n in positions
    ]
    found += [
        Figure(f"keys and values at {n:,}, MB", lambda run, n=n: _mega(run["kv"].get(str(n))), 2, "low")  # type: ignore[misc]
        for n in results.positions
    ]
    found.append(Figure("most memory while starting, MB", lambda run: _mega(run["start_rss"]), 0, "low"))
    found.append(Figure("most memory of the process, MB", lambda run: _mega(run["rss"]), 0, "low"))
    return found


def show(results: Results, console: Console) -> None:
    """The table, with ratios to mlx-lm in the same round, and what has to be said besides."""
    console.print(Text.assemble((results.model["name"], "bold"), " · ", describe(results.machine)))
    rounds = max((len(runs) for runs in results.runs.values()), default=0)
    title = f"median (lowest–highest) of {rounds} rounds · × is the ratio to {BASE}, better when above 1"
    table = Table(title=title, title_justify="left", title_style="dim", highlight=False)
    table.add_column("")
    for engine in results.runs:
        table.add_column(engine, justify="right", overflow="fold")
    for figure in figures(results):
        cells = [cell(results, figure, engine) for engine in results.runs]
        if any(c != "–" for c in cells):
            table.add_row(figure.name, *cells)
    for row in roofline(results):
        table.add_row(*row)
    console.print(table)
    for note in [*agreement(results), *results.notes]:
        console.print(f"• {note}")


def cell(results: Results, figure: Figure, engine: str) -> str:
    """ "31.2 (30.9–31.5) 2.91×", or – where there is nothing."""
    values = [v for run in results.runs[engine] if (v := figure.read(run)) is not None]
    if not values:
        return "–"
    text = spread(values, figure.digits)
    by = ratio(results, figure, engine)
    return text if by is None or engine == BASE else f"{text} {by:.2f}×"


def ratio(results: Results, figure: Figure, engine: str, base: str = BASE) -> float | None:
    """How many times better than `base`, the median of the rounds."""
    pairs = zip(results.runs.get(engine, []), results.runs.get(base, []), strict=False)
    found = []
    for ours, theirs in pairs:
        a, b = figure.read(ours), figure.read(theirs)
        if a and b:
            found.append(a / b if figure.better == "high" else b / a)
    return statistics.median(found) if found else None


def roofline(results: Results) -> list[list[str]]:
    """Bytes that a token must move, over the bandwidth measured in the same run: the share of the possible speed."""
    if not results.bandwidth:
        return []
    bandwidth, rows = statistics.median(results.bandwidth), []
    for position in sorted({*results.positions, min(results.prompts)}):
        cells = []
        for runs in results.runs.values():
            shares = []
            for run in runs:
                if (ms := run["decode"].get(str(position))) is not None:
                    moved = run["moved"] + (run["kv"].get(str(position)) or 0)
                    shares.append(moved / bandwidth / (ms / 1e3))
            cells.append(f"{statistics.median(shares):.0%}" if shares else "–")
        rows.append([f"decode at {position:,}, of the limit by bandwidth ({in_gigabytes(bandwidth)}/s)", *cells])
    return rows


def agreement(results: Results) -> list[str]:
    """Whether all engines chose the same tokens."""
    chosen = {engine: runs[0]["tokens"] for engine, runs in results.runs.items() if runs}
    if len(chosen) < 2:
        return []
    first = next(iter(chosen.values()))
    other = [engine for engine, tokens in chosen.items() if tokens != first]
    text = f"the first {len(first)} greedy tokens are the same"
    return [f"{text} in all engines" if not other else f"{text}, but for {', '.join(other)}"]


def spread(values: Sequence[float], digits: int = 1) -> str:
    """Median, and lowest to highest."""
    middle = f"{statistics.median(values):,.{digits}f}"
    return middle if len(values) == 1 else f"{middle} ({min(values):,.{digits}f}–{max(values):,.{digits}f})"


def machine(blas: str) -> dict[str, Any]:
    """What the figures were measured on, and with."""
    import os

    import mlx.core as mx

    from m7mlx.arrays import on_cpu
    from m7mlx.memory import machine_memory

    versions = {}
    for package in _PACKAGES:
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            continue
    return {
        "system": f"{platform.system()} {platform.machine()}",
        "cores": os.cpu_count(),
        "memory": machine_memory(),
        "device": "CPU" if on_cpu() else str(mx.device_info().get("device_name", mx.default_device())),
        "blas": blas or "MLX's own",
        "python": platform.python_version(),
        "versions": versions,
    }


def describe(machine: Mapping[str, Any]) -> str:
    """In one line."""
    versions = ", ".join(f"{name} {number}" for name, number in machine["versions"].items())
    blas = f", BLAS {machine['blas']}" if machine["device"] == "CPU" else ""
    return f"{machine['system']}, {machine['cores']} cores, {machine['device']}{blas} · {versions}"


def _per_second(ms: float | None) -> float | None:
    return None if ms is None else 1e3 / ms


def _mega(nbytes: float | None) -> float | None:
    return None if nbytes is None else nbytes / 1e6
