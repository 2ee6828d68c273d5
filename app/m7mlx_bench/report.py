"""From runs to medians, spreads and ratios; as a table, as JSON."""

from __future__ import annotations

import os
import platform
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import mlx.core as mx
from rich.console import Console
from rich.table import Table
from rich.text import Text

from m7mlx.arrays import on_cpu
from m7mlx.cpu import blas, native
from m7mlx.memory import machine_memory
from m7mlx.units import counted, in_gigabytes

_PACKAGES = ("mlx", "mlx-lm", "torch", "transformers", "llama-cpp-python")


@dataclass
class Results:
    """Everything that a run of m7mlx-bench found.

    runs       engine → one dictionary of figures (`m7mlx_bench.worker.measure`) per round
    bandwidth  bytes per second, per round
    against    ratios are to this engine, where it ran
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
    against: str = "mlx-lm"

    def to_dict(self) -> dict[str, Any]:
        """Return all of it as JSON has it."""
        return dict(vars(self))


@dataclass(frozen=True)
class Figure:
    """One row of a table: how to read it from a run, how to print it, which side is better.

    better  "high" or "low"; "" where neither is, so that there is no ratio
    """

    name: str
    read: Callable[[Mapping[str, Any]], float | None]
    digits: int = 1
    better: str = "high"


def figures(results: Results) -> list[Figure]:
    """List the rows of the table, top to bottom."""
    found = [Figure("start to first token, s", lambda run: run["first_s"], 2, "low")]
    found += [Figure(f"prefill of {n:,}, tok/s", _reading("prefill", n)) for n in results.prompts]
    positions = sorted({*results.positions, min(results.prompts)})
    found += [Figure(f"decode at {n:,}, tok/s", _reading("decode", n, _per_second)) for n in positions]
    found += [Figure(f"keys and values at {n:,}, MB", _reading("kv", n, _mega), 2, "low") for n in results.positions]
    found.append(Figure("most memory while starting, MB", lambda run: _mega(run["start_rss"]), 0, "low"))
    found.append(Figure("most memory of the process, MB", lambda run: _mega(run["rss"]), 0, "low"))
    found.append(Figure("mapped files in it, MB", lambda run: _mega(run["mapped"]), 0, ""))
    return found


def _reading(
    kind: str,
    place: int,
    convert: Callable[[float | None], float | None] = lambda value: value,
) -> Callable[[Mapping[str, Any]], float | None]:
    """Return what reads a run's figure of a kind at a position or length."""
    return lambda run: convert(run[kind].get(str(place)))


def show(results: Results, console: Console) -> None:
    """Print the table, with ratios to mlx-lm in the same round, and the notes."""
    console.print(Text.assemble((results.model["name"], "bold"), " · ", machine_line(results.machine)))
    rounds = max((len(runs) for runs in results.runs.values()), default=0)
    title = f"median (lowest–highest) of {rounds} rounds"
    if results.against in results.runs:
        title += f" · × is the ratio to {results.against}, better when above 1"
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
    """Write a cell: "31.2 (30.9–31.5) 2.91×", or – where there is nothing."""
    values = [v for run in results.runs[engine] if (v := figure.read(run)) is not None]
    if not values:
        return "–"
    text = spread(values, figure.digits)
    by = ratio(results, figure, engine)
    return text if by is None or engine == results.against else f"{text} {by:.2f}×"


def ratio(results: Results, figure: Figure, engine: str) -> float | None:
    """Return how many times better an engine is than the one compared with: median of rounds."""
    pairs = zip(results.runs.get(engine, []), results.runs.get(results.against, []), strict=False)
    found = []
    for ours, theirs in pairs:
        a, b = figure.read(ours), figure.read(theirs)
        if a and b and figure.better:
            found.append(a / b if figure.better == "high" else b / a)
    return statistics.median(found) if found else None


def roofline(results: Results) -> list[list[str]]:
    """Write rows with the share of the speed that the memory allows.

    That is the bytes that a token must move over the bandwidth measured in the same run.
    """
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
    """Write a note on whether all engines chose the same tokens, as far as all have come."""
    chosen = {engine: tokens for engine, runs in results.runs.items() if runs and (tokens := runs[0]["tokens"])}
    if len(chosen) < 2:
        return []
    count = min(map(len, chosen.values()))
    first = next(iter(chosen.values()))[:count]
    other = [engine for engine, tokens in chosen.items() if tokens[:count] != first]
    text = f"{counted(count, 'greedy token')} from the first on: the same"
    return [f"{text} in all engines" if not other else f"{text}, but for {', '.join(other)}"]


def spread(values: Sequence[float], digits: int = 1, unit: str = "") -> str:
    """Write the median, and lowest to highest: "31.2 (30.9–31.5)"."""
    middle = f"{statistics.median(values):,.{digits}f}{unit}"
    return middle if len(values) == 1 else f"{middle} ({min(values):,.{digits}f}–{max(values):,.{digits}f})"


def machine_facts() -> dict[str, Any]:
    """Return what the figures are measured on, and with."""
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
        "blas": blas.library or "MLX's own",
        "kernels": native.instruction_set() or "MLX's own",
        "python": platform.python_version(),
        "versions": versions,
    }


def machine_line(machine: Mapping[str, Any]) -> str:
    """Write what `machine_facts` found in one line."""
    versions = ", ".join(f"{name} {number}" for name, number in machine["versions"].items())
    library = f", kernels {machine['kernels']}, BLAS {machine['blas']}" if machine["device"] == "CPU" else ""
    return f"{machine['system']}, {machine['cores']} cores, {machine['device']}{library} · {versions}"


def _per_second(ms: float | None) -> float | None:
    return None if ms is None else 1e3 / ms


def _mega(nbytes: float | None) -> float | None:
    return None if nbytes is None else nbytes / 1e6
