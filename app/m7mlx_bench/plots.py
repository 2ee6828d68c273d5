"""A plot of the figures: decoding, keys and values by position, prefill by length."""

from __future__ import annotations

import statistics
from io import BytesIO
from pathlib import Path
from typing import Any

from m7mlx.files.disk import write_whole
from m7mlx_bench.report import Results, machine_line

FORMATS = (".png", ".svg")


def draw_plot(results: Results, path: Path) -> None:
    """Draw a PNG or SVG, with matplotlib."""
    import matplotlib  # optional, and slow to import

    matplotlib.use("Agg")
    from matplotlib import pyplot

    window = results.model.get("window")
    panels = [
        ("decode", "decode, ms per token"),
        ("kv", "keys and values, MB"),
        ("prefill", "prefill, tokens per second"),
    ]
    figure, axes = pyplot.subplots(1, 3, figsize=(15, 4.6), layout="constrained")
    for axis, (key, label) in zip(axes, panels, strict=True):
        for engine, runs in results.runs.items():
            _line(axis, runs, key, engine)
        axis.set(
            xscale="log",
            yscale="log",
            xlabel="tokens of the prompt" if key == "prefill" else "position",
            ylabel=label,
        )
        axis.xaxis.set_major_formatter(lambda x, _: f"{x:,.0f}")
        axis.yaxis.set_major_formatter(lambda y, _: f"{y:,g}")
        axis.grid(which="major", alpha=0.3)
        if window and key != "prefill":
            axis.axvline(window, color="grey", linestyle=":", linewidth=1)
            axis.annotate(
                " window", (window, 1), xycoords=("data", "axes fraction"), va="top", color="grey", fontsize=8
            )
    axes[0].legend(fontsize=8)
    figure.suptitle(f"{results.model['name']} · {machine_line(results.machine)}", fontsize=9)
    drawn = BytesIO()
    figure.savefig(drawn, dpi=120, format=path.suffix[1:].lower())
    pyplot.close(figure)
    write_whole(path, drawn.getvalue())


def _line(axis: Any, runs: list[dict[str, Any]], key: str, engine: str) -> None:
    # Where an engine has to read its way, not every round may have got as far as the others.
    places = sorted(int(place) for place in runs[0][key] if all(place in run[key] for run in runs))
    values = [[run[key][str(place)] / (1e6 if key == "kv" else 1) for run in runs] for place in places]
    middle = [statistics.median(each) for each in values]
    ours = engine == "m7mlx"
    (line,) = axis.plot(
        places,
        middle,
        marker="o",
        markersize=4,
        linewidth=2.5 if ours else 1.2,
        label=engine,
        zorder=3 if ours else 2,
    )
    axis.fill_between(places, [min(v) for v in values], [max(v) for v in values], color=line.get_color(), alpha=0.15)
