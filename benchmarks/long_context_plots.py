"""The figures of `long_context.py` as one picture, in the manner of m7mlx-bench's."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

COLOURS = {"window": "C0", "4 sinks": "C2", "full": "C1", "m7mlx": "C0", "mlx-lm": "C1"}
NAMES = {"window": "window", "4 sinks": "4 sinks and the last", "full": "full attention"}
OURS = ("window", "m7mlx")


def plot(results: dict[str, Any], path: Path) -> None:
    """Write a PNG or SVG with a panel for each part that `results` holds."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    wanted: list[tuple[str, Callable[[Any, dict[str, Any]], None]]] = [
        ("perplexity", _perplexity),
        ("passkey", _passkey),
        ("reach", _reach),
        ("cost", _cost("ms", 1, "decode, ms per token")),
        ("cost", _cost("kv", 1e6, "keys and values, MB")),
        ("cost", _cost("rss", 1e6, "memory of the process, MB")),
    ]
    panels = [(name, draw) for name, draw in wanted if name in results]
    columns = min(3, len(panels))
    rows = math.ceil(len(panels) / columns)
    figure, axes = pyplot.subplots(
        rows, columns, figsize=(5 * columns, 4.4 * rows), layout="constrained", squeeze=False
    )
    for axis in axes.flat[len(panels) :]:
        axis.axis("off")
    for axis, (name, draw) in zip(axes.flat, panels, strict=False):
        draw(axis, results[name])
        axis.grid(which="major", alpha=0.3)
        axis.legend(fontsize=8)
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


def _line(axis: Any, x: list[float], runs: list[list[float]], name: str, label: str) -> None:
    """Means of `runs` [x][repeats], and lowest to highest as a band."""
    (line,) = axis.plot(
        x,
        [statistics.fmean(values) for values in runs],
        marker="o",
        markersize=3,
        linewidth=2.5 if name in OURS else 1.2,
        color=COLOURS.get(name),
        label=label,
        zorder=3 if name in OURS else 2,
    )
    axis.fill_between(x, [min(v) for v in runs], [max(v) for v in runs], color=line.get_color(), alpha=0.15)


def _perplexity(axis: Any, found: dict[str, Any]) -> None:
    window, fresh = found["window"], found["runs"]["fresh"]
    for name, texts in found["runs"].items():
        if name == "fresh":
            continue
        pairs = list(zip(texts, fresh, strict=False))
        by_window = [[math.exp(a[i] - b[i]) for a, b in pairs] for i in range(len(texts[0]))]
        x = [(i + 0.5) * window for i in range(len(by_window))]
        _line(axis, x, by_window, name, f"{NAMES[name]}{f' {window:,}' if name != 'full' else ''}")
    axis.axvline(8192, color="grey", linestyle=":", linewidth=1)
    axis.annotate(
        " trained context", (8192, 1), xycoords=("data", "axes fraction"), va="top", color="grey", fontsize=8
    )
    axis.set(
        yscale="log",
        xlabel=f"position, to {len(by_window)} windows",
        ylabel="perplexity / that of the same text read afresh",
    )
    axis.yaxis.set_major_formatter(lambda y, _: f"{y:,g}")
    axis.yaxis.set_minor_formatter(lambda y, _: f"{y:,g}" if f"{y:.1e}"[0] in "1235" else "")
    axis.xaxis.set_major_formatter(lambda x, _: f"{x:,.0f}")


def _passkey(axis: Any, found: dict[str, Any]) -> None:
    window = found["window"]
    for name, run in found["runs"].items():
        count = len(run["greedy"][0])
        right = [sum(values) for values in run["greedy"]]
        _line(
            axis, found["distances"], run["margins"], name, NAMES[name] + (f" {window:,}" if name != "full" else "")
        )
        for at, n in enumerate(right):  # filled where greedy decoding gives the number
            axis.plot(
                found["distances"][at],
                statistics.fmean(run["margins"][at]),
                "o",
                markersize=7,
                color=COLOURS[name],
                fillstyle="full" if 2 * n > count else "none",
                zorder=4,
            )
    _mark_window(axis, window)
    axis.set(xscale="log", xlabel="distance of the number, tokens", ylabel="margin of the right digits, nats a digit")
    axis.set_yscale("symlog", linthresh=1e-3)
    axis.xaxis.set_major_formatter(lambda x, _: f"{x:,.0f}")


def _reach(axis: Any, runs: dict[str, Any]) -> None:
    for i, (name, run) in enumerate(runs.items()):
        hops = [distance / (run["window"] - 1) for distance in run["distances"]]
        within = [(x, y) for x, y in zip(hops, run["changes"], strict=True) if y > 0]
        axis.plot(
            *zip(*within, strict=True),
            color=f"C{i}",
            linewidth=1.5,
            marker="o",
            markersize=2,
            label=f"{name}, window {run['window']}",
        )
        axis.axvline(run["layers"], color=f"C{i}", linestyle=":", linewidth=1)
        axis.annotate(
            f" {run['layers']} layers: 0 from here on",
            (run["layers"], 0.02),
            xycoords=("data", "axes fraction"),
            rotation=90,
            ha="right",
            color=f"C{i}",
            fontsize=8,
        )
    axis.set(
        xscale="log",
        yscale="log",
        xlabel="distance of the changed token / (W − 1)",
        ylabel="greatest change of a logit",
    )
    axis.xaxis.set_major_formatter(lambda x, _: f"{x:g}")


def _cost(key: str, unit: float, label: str) -> Callable[[Any, dict[str, Any]], None]:
    def draw(axis: Any, found: dict[str, Any]) -> None:
        for engine, rows in found["runs"].items():
            _line(axis, [row["position"] for row in rows], [[row[key] / unit] for row in rows], engine, engine)
        _mark_window(axis, found["window"])
        axis.set(xscale="log", yscale="log", xlabel="position", ylabel=label)
        axis.xaxis.set_major_formatter(lambda x, _: f"{x:,.0f}")
        axis.yaxis.set_major_formatter(lambda y, _: f"{y:,g}")

    return draw


def _mark_window(axis: Any, window: int) -> None:
    axis.axvline(window, color="grey", linestyle=":", linewidth=1)
    axis.annotate(" window", (window, 1), xycoords=("data", "axes fraction"), va="top", color="grey", fontsize=8)
