"""The figures of `long_context.py` as one picture, in the manner of m7mlx-bench's."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

COLOURS = {"window": "C0", "4 sinks": "C2", "full": "C1", "m7mlx": "C0", "mlx-lm": "C1"}
OURS = ("window", "m7mlx")


def plot(results: dict[str, Any], path: Path) -> None:
    """Write a PNG or SVG with a panel for each part that `results` holds, for the cost three."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    wanted: list[tuple[str, str, Callable[[Any, dict[str, Any]], None]]] = [
        ("perplexity", "perplexity by position", _perplexity),
        ("passkey", "a number, asked for later", _passkey),
        ("reach", "how far a token reaches", _reach),
        ("cost", "time", _cost("ms", 1, "decode, ms per token")),
        ("cost", "keys and values", _cost("kv", 1e6, "MB")),
        ("cost", "memory of the process", _cost("rss", 1e6, "MB")),
    ]
    panels = [panel for panel in wanted if panel[0] in results]
    columns = min(3, len(panels))
    rows = math.ceil(len(panels) / columns)
    figure, axes = pyplot.subplots(
        rows, columns, figsize=(5 * columns, 4.4 * rows), layout="constrained", squeeze=False
    )
    for axis in axes.flat[len(panels) :]:
        axis.axis("off")
    for axis, (name, title, draw) in zip(axes.flat, panels, strict=False):
        draw(axis, results[name])
        axis.set_title(title, fontsize=11)
        axis.grid(which="major", alpha=0.3)
        axis.legend(fontsize=8, loc="upper right" if name == "reach" else "best")
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


def _perplexity(axis: Any, found: dict[str, Any]) -> None:
    """Means over the texts, and lowest to highest as a band."""
    window, fresh = found["window"], found["runs"]["fresh"]
    for name, texts in found["runs"].items():
        if name == "fresh":
            continue
        pairs = list(zip(texts, fresh, strict=False))  # fewer texts where one takes long to read
        ratios = [[math.exp(a[i] - b[i]) for a, b in pairs] for i in range(len(texts[0]))]
        x = [(i + 0.5) * window for i in range(len(ratios))]
        _line(axis, x, [statistics.fmean(values) for values in ratios], name, _name(name, window))
        low, high = [min(values) for values in ratios], [max(values) for values in ratios]
        axis.fill_between(x, low, high, color=COLOURS[name], alpha=0.15)
    _mark(axis, found["context"], "trained context")
    axis.axhline(1, color="grey", linewidth=0.8)
    axis.set(yscale="log", xlabel="position, tokens", ylabel="perplexity / that with fresh context")
    axis.set_ylim(bottom=min(0.8, axis.get_ylim()[0]))
    axis.locator_params(axis="x", nbins=5)
    axis.xaxis.set_major_formatter(_number)
    axis.yaxis.set_major_formatter(_number)
    axis.yaxis.set_minor_formatter(_some)


def _passkey(axis: Any, found: dict[str, Any]) -> None:
    """Draw how the number moves the probability of its digits; filled where decoding gives it."""
    window, distances = found["window"], found["distances"]
    for name, run in found["runs"].items():
        moves = [statistics.fmean(map(abs, margins)) for margins in run["margins"]]
        _line(axis, distances[: len(moves)], moves, name, _name(name, window))
        for distance, move, right in zip(distances, moves, run["greedy"], strict=False):
            fill = COLOURS[name] if 2 * sum(right) > len(right) else "white"
            axis.plot(distance, move, "o", markersize=6, color=COLOURS[name], markerfacecolor=fill, zorder=4)
    _mark(axis, window, "window")
    axis.set(xscale="log", yscale="log", xlabel="distance, tokens (filled: the answer is right)")
    axis.set(ylabel="what it moves its digits by, nats each")
    axis.xaxis.set_major_formatter(_number)


def _reach(axis: Any, runs: dict[str, Any]) -> None:
    """The part that is not 0: a logarithmic axis has no place for the rest."""
    for i, (name, run) in enumerate(runs.items()):
        hops = [distance / (run["window"] - 1) for distance in run["distances"]]
        within = [(x, y) for x, y in zip(hops, run["changes"], strict=True) if y > 0]
        x, y = zip(*within, strict=True)
        axis.plot(x, y, color=f"C{i}", marker="o", markersize=2, label=f"{name}, window {run['window']}")
        _mark(axis, run["layers"], f"{run['layers']} layers: exactly 0 beyond", f"C{i}", at=0.03)
    axis.set(yscale="log", xlabel="distance of the changed token / (W − 1)", ylabel="greatest change of a logit")


def _cost(key: str, unit: float, label: str) -> Callable[[Any, dict[str, Any]], None]:
    def draw(axis: Any, found: dict[str, Any]) -> None:
        for engine, rows in found["runs"].items():
            _line(axis, [row["position"] for row in rows], [row[key] / unit for row in rows], engine, engine)
        _mark(axis, found["window"], "window")
        axis.set(xscale="log", yscale="log", xlabel="position, tokens", ylabel=label)
        low, high = axis.get_ylim()
        axis.set_ylim(low / 2, high * 2)  # or what is flat would show its noise alone
        axis.xaxis.set_major_formatter(_number)
        axis.yaxis.set_major_formatter(_number)
        axis.yaxis.set_minor_formatter(_some)

    return draw


def _line(axis: Any, x: Sequence[float], y: Sequence[float], name: str, label: str) -> None:
    ours = name in OURS
    width = 2.5 if ours else 1.2
    axis.plot(x, y, "o-", markersize=3, linewidth=width, color=COLOURS[name], label=label, zorder=3 if ours else 2)


def _mark(axis: Any, x: float, text: str, color: str = "grey", at: float = 1) -> None:
    """A dotted line at x, and beside it what it stands for; `at` below 1 upright from there."""
    axis.axvline(x, color=color, linestyle=":", linewidth=1)
    place = {"va": "top"} if at == 1 else {"va": "bottom", "ha": "right", "rotation": 90}
    axis.annotate(f" {text}", (x, at), xycoords=("data", "axes fraction"), color=color, fontsize=8, **place)


def _name(way: str, window: int) -> str:
    return {"window": f"window {window:,}", "4 sinks": f"4 sinks and {window - 4:,}", "full": "full attention"}[way]


def _number(x: float, _: int) -> str:
    return f"{x:,g}"


def _some(x: float, _: int) -> str:
    """Label the minor ticks 2 and 5 of a logarithmic axis."""
    return f"{x:,g}" if f"{x:e}"[0] in "25" else ""
