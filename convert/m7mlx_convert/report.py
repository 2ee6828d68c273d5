"""A comparison for people: a table in the terminal, and an HTML file with plots."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from m7mlx.files.disk import write_whole
from m7mlx.units import counted
from m7mlx_convert.verify import Comparison

_WIDTH, _HEIGHT = 640, 220  # of a plot, in its own units
_LEFT, _BELOW, _ABOVE = 56, 28, 12


def summary(comparison: Comparison) -> list[tuple[str, str]]:
    """Sum the comparison up in a few lines: what is measured, and what came out."""
    before, after = comparison.perplexities
    kl, high = comparison.kl, np.quantile(comparison.kl, 0.99)
    return [
        ("perplexity", f"{before:.4g} → {after:.4g} ({after / before - 1:+.2%})"),
        (
            "KL divergence",
            f"{kl.mean():.3g} nats on average, {high:.3g} at 99 %, {kl.max():.3g} at most",
        ),
        ("top-1 agreement", f"{comparison.agrees.mean():.2%} of {kl.size:,} predictions"),
    ]


def comparison_table(comparison: Comparison) -> RenderableType:
    """Write the comparison for a terminal."""
    title = Text(f"{comparison.result} against {comparison.source}, {counted(len(comparison.text.ids), 'token')}")
    table = Table(title=title, title_justify="left", box=None, pad_edge=False)
    table.add_column("layer")
    for heading in ("weights", "worst matrix", "", "hidden states"):
        table.add_column(heading, justify="left" if heading == "worst matrix" else "right")
    for module in ("model.embed_tokens", "lm_head"):
        if module in comparison.weights:
            table.add_row(module.removeprefix("model."), f"{comparison.weights[module]:.2%}")
    for index, hidden in enumerate(comparison.hidden):
        worst, error, mean = comparison.layer(index)
        table.add_row(str(index), f"{mean:.2%}", worst, f"{error:.2%}", f"{hidden:.2%}")
    lines = [f"{name:16}{value}" for name, value in summary(comparison)]
    return Group(table, Text("\n" + "\n".join(lines)))


def write_report(comparison: Comparison, path: Path) -> None:
    """Write an HTML file: figures, plots, and the text with each token's divergence."""
    # Few ask for a report.
    from jinja2 import Environment, PackageLoader, StrictUndefined

    layers = range(len(comparison.hidden))
    # A divergence belongs to the token that was to be predicted, and nothing predicts the first.
    shades = [0.0, *(min(1.0, float(value) / 0.5) for value in comparison.kl)]
    environment = Environment(loader=PackageLoader("m7mlx_convert", "."), autoescape=True, undefined=StrictUndefined)
    html = environment.get_template("report.html.jinja").render(
        comparison=comparison,
        summary=summary(comparison),
        plots=[
            _plot("Weights: relative error of each layer", [[comparison.layer(i)[2] for i in layers]], "layer"),
            _plot("Hidden states: relative error after each layer", [comparison.hidden], "layer"),
            _plot("KL divergence of the predictions, sorted", [np.sort(comparison.kl)], "share of the predictions"),
        ],
        tokens=[
            (piece, f"{shade:.2f}", f"{0.0 if i == 0 else comparison.kl[i - 1]:.3g}")
            for i, (piece, shade) in enumerate(zip(comparison.text.pieces, shades, strict=True))
        ],
        modules=sorted(comparison.weights.items(), key=lambda item: -item[1]),
    )
    write_whole(path, html)


def _plot(title: str, lines: Sequence[Sequence[float] | np.ndarray], across: str) -> dict[str, Any]:
    """Describe lines over a common scale from 0, as the template draws them."""
    top = _round_up(max(float(np.max(line)) for line in lines)) or 1.0
    height = _HEIGHT - _BELOW - _ABOVE

    def points(line: Sequence[float] | np.ndarray) -> str:
        step = (_WIDTH - _LEFT) / max(1, len(line) - 1)
        every = max(1, len(line) // _WIDTH)
        chosen = sorted({*range(0, len(line), every), len(line) - 1})
        return " ".join(f"{_LEFT + i * step:.1f},{_ABOVE + height * (1 - line[i] / top):.1f}" for i in chosen)

    ticks = [(f"{top * k / 4:.3g}", _ABOVE + height * (1 - k / 4)) for k in range(5)]
    ends = ("0 %", "100 %") if "share" in across else ("0", str(len(lines[0]) - 1))
    return {
        "title": title,
        "lines": [points(line) for line in lines],
        "ticks": ticks,
        "across": across,
        "ends": ends,
        "size": (_WIDTH, _HEIGHT, _LEFT),
    }


def _round_up(value: float) -> float:
    """Round up to 1, 2, 4, 5, 8 or 10 times a power of ten."""
    if value <= 0 or not math.isfinite(value):
        return 0.0
    power = 10.0 ** math.floor(math.log10(value))
    return next(step * power for step in (1, 2, 4, 5, 8, 10) if step * power >= value * 0.999999)
