"""Figures for people, and files for programs."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rich.table import Table

from m7mlx.files.disk import write_whole
from m7mlx.terminal import console
from m7mlx.units import counted

_KEPT = ("results", "groups", "group_subtasks", "versions", "n-shot", "higher_is_better", "n-samples")


def show_text(found: Mapping[str, Any]) -> None:
    """Print the figures of `m7mlx_eval.perplexity.Result.to_dict`."""
    reference = found.get("reference")
    sides = [(found["model"], found), *([(found["against"], reference)] if reference else [])]
    table = _table("", *(name for name, _ in sides))
    table.add_row("perplexity", *(f"{s['perplexity']:.4f} ± {s['perplexity_stderr']:.4f}" for _, s in sides))
    table.add_row("loss, nats a token", *(f"{s['loss']:.4f} ± {s['loss_stderr']:.4f}" for _, s in sides))
    table.add_row("bits per byte", *(f"{s['bits_per_byte']:.4f}" for _, s in sides))
    if reference:
        kl, agrees = found["kl"], found["top1_agreement"]
        table.add_row(f"KL from {found['against']}", f"{kl['mean']:.5f} ± {kl['stderr']:.5f}", "")
        table.add_row("top-1 agreement", f"{agrees['mean']:.2%} ± {agrees['stderr']:.2%}", "")
    _print(table)
    print(
        f"{counted(found['tokens'], 'token')} scored, {counted(found['bytes'], 'byte')}, in "
        f"{counted(found['documents'], 'document')} and {counted(found['windows'], 'window')}"
    )


def pick_figures(results: Mapping[str, Any]) -> dict[str, Any]:
    """Return what is worth keeping of the harness's results, under its names."""
    return {name: results[name] for name in _KEPT if results.get(name)}


def show_tasks(found: Mapping[str, Any]) -> None:
    """Print the results of tasks and groups."""
    table = _table("task", "examples", "filter", "metric", "value", "±")
    for name, metrics in (found.get("results", {}) | found.get("groups", {})).items():
        for key, value in metrics.items():
            metric, _, kind = key.partition(",")
            if metric.endswith("_stderr") or not kind or not isinstance(value, int | float):
                continue
            error = metrics.get(f"{metric}_stderr,{kind}")
            shown = f"{error:.4f}" if isinstance(error, int | float) else ""
            table.add_row(name, str(found.get("n-shot", {}).get(name, "")), kind, metric, f"{value:.4f}", shown)
    _print(table)


def write_samples(folder: Path, found: Mapping[str, Any], results: Mapping[str, Any]) -> None:
    """Write results.json, and each question with its answer in samples-TASK.jsonl.

    Raises DiskError.
    """
    write_whole(folder / "results.json", json.dumps(found, indent=1, default=str) + "\n")
    for name, samples in (results.get("samples") or {}).items():
        safe = "".join(c if c.isalnum() or c in "-_." else "_" for c in name)
        lines = (json.dumps(sample, default=str) + "\n" for sample in samples)
        write_whole(folder / f"samples-{safe}.jsonl", "".join(lines))


def _table(*heads: str) -> Table:
    table = Table(box=None, pad_edge=False)
    for i, head in enumerate(heads):
        table.add_column(head, justify="left" if i == 0 else "right")
    return table


def _print(table: Table) -> None:
    console(width=None if sys.stdout.isatty() else 1000).print(table)
