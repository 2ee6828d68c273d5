"""Where dividing a model pays: a simulation, not a measurement, with what m7mlx-plan estimates.

    python benchmarks/cluster.py [--model mistral] [--plot docs/cluster.png]

Tokens per second of one conversation, Mistral 7B in 4 and in 16 bits, on Macs of 273 GB/s (M4
Pro), by number of machines, way of dividing and link.
"""

from __future__ import annotations

import m7mlx  # noqa: F401  first: it loads a fast BLAS, before mlx.core is imported

# isort: split
import argparse
from pathlib import Path

from common import table
from m7mlx_plan.estimate import NETWORKS, estimate
from m7mlx_plan.weights import list_weights

from m7mlx.shard import MODES, Mode

RANKS = (1, 2, 4, 8)
NAMES = {"rdma": "Thunderbolt 5, RDMA", "thunderbolt": "Thunderbolt, TCP", "10gbe": "10 GbE", "1gbe": "1 GbE"}


def speeds(model: str, bits: int, mode: Mode, link: str) -> list[float]:
    config, tensors = list_weights(model, bits)
    found = (estimate(config, tensors, mode, n, NETWORKS[link], positions=4096) for n in RANKS)
    return [1 / one.seconds for one in found]


def draw(model: str, path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, 2, figsize=(11, 4.2), layout="constrained")
    for axis, bits in zip(axes, (4, 16), strict=True):
        for mode, style in zip(MODES, ("-", "--"), strict=True):
            for colour, link in enumerate(NETWORKS):
                values = speeds(model, bits, mode, link)
                axis.plot(RANKS, values, style, color=f"C{colour}", marker="o", label=f"{mode}, {NAMES[link]}")
        axis.axhline(speeds(model, bits, "tensor", "rdma")[0], color="grey", linestyle=":", linewidth=1)
        axis.set(
            xscale="log", xlabel="machines", ylabel="tokens per second", title=f"{model}, {bits} bits", ylim=(0, None)
        )
        axis.set_xticks(RANKS, [str(n) for n in RANKS])
        axis.minorticks_off()
        axis.grid(alpha=0.3)
    axes[1].legend(fontsize=7)
    figure.suptitle(
        "Simulated: 273 GB/s a machine, 65 % of it; 10 µs by RDMA, 300 µs by TCP; dotted: one machine", fontsize=9
    )
    figure.savefig(path, dpi=120)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="mistral")
    parser.add_argument("--plot", type=Path)
    args = parser.parse_args()
    rows = []
    for bits in (4, 16):
        for mode in MODES:
            for link in NETWORKS:
                values = speeds(args.model, bits, mode, link)
                rows.append([str(bits), mode, NAMES[link], *(f"{v:.1f}" for v in values)])
    table(["bits", "divided", "link", *(f"{n} machine{'s' * (n > 1)}" for n in RANKS)], rows)
    if args.plot:
        draw(args.model, args.plot)


if __name__ == "__main__":
    main()
