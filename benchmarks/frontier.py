"""Quality against bytes: every scheme of m7mlx-convert on one model.

    python benchmarks/frontier.py --work /tmp/frontier [--model demo] [--tokens 4096] [--plot
        docs/frontier.png]

Each scheme is converted from the model in float32 (one that is quantised already is expanded
first, and that is the reference) and measured on Python's own reference documentation: bytes of
the weight files, perplexity, KL divergence from the reference in nats, and how often both find the
same token the likeliest. What was measured is kept in the work folder, so that a run that was
stopped goes on.
"""

from __future__ import annotations

import m7mlx  # noqa: F401  first: it loads a fast BLAS, before mlx.core is imported

# isort: split
import argparse
import json
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

from common import machine_line, table
from m7mlx_eval.perplexity import Reading, Result, evaluate

from m7mlx import Mistral, Tokenizer, load
from m7mlx.files.hub import resolve

GROUPS = (32, 64, 128)
BITS = (2, 3, 4, 5, 6, 8)
FAMILIES = (
    "affine, groups of 32",
    "affine, groups of 64",
    "affine, groups of 128",
    "float formats",
    "mixed",
    "by data",
)


def schemes() -> Iterator[tuple[str, str, list[str]]]:
    """Name, family, and what m7mlx-convert is given."""
    for bits in BITS:
        for group in GROUPS:
            options = ["--q-bits", str(bits), "--q-group-size", str(group)]
            yield f"{bits} bits, groups of {group}", f"affine, groups of {group}", options
    for mode in ("mxfp4", "mxfp8", "nvfp4"):
        yield mode, "float formats", ["--q-mode", mode]
    for mix in ("mixed_2_6", "mixed_3_4", "mixed_3_6", "mixed_4_6"):
        yield mix, "mixed", ["--quant-predicate", mix]
    for bits in (2, 3, 4):
        yield f"gptq, {bits} bits", "by data", ["--calibrate", "gptq", "--q-bits", str(bits)]
        yield f"awq, {bits} bits", "by data", ["--calibrate", "awq", "--q-bits", str(bits)]
        yield f"dwq, {bits} bits", "by data", ["--calibrate", "dwq", "--q-bits", str(bits)]
    yield "dynamic, 5 bits on average", "by data", ["--calibrate", "dynamic"]


def convert(source: Path, target: Path, options: Sequence[str], limit: float | None = None) -> str:
    """Convert; why not, where it fails or takes longer than the limit in seconds."""
    command = [sys.executable, "-m", "m7mlx_convert", str(source), "--mlx-path", str(target), "--quiet", *options]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=limit)
    except subprocess.TimeoutExpired:
        return f"took more than {limit:g} s"
    return done.stderr.strip().splitlines()[-1] if done.returncode else ""


def measure(folder: Path, ids: Tokenizer, reference: Mistral, tokens: int) -> dict[str, Any]:
    """Bytes and quality of a model folder."""
    text = "\n".join(topics[name] for name in sorted(topics))
    model, _ = load(folder)
    result: Result = evaluate(model, ids, [text[: tokens * 32]], Reading(max_tokens=tokens), reference=reference)
    size = sum(path.stat().st_size for path in folder.glob("*.safetensors"))
    return {"file_bytes": size, "bits": 8 * size / model.config.n_weights} | result.to_dict()


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Figures by scheme, and what was left out and why."""
    work: Path = args.work
    work.mkdir(parents=True, exist_ok=True)
    kept = work / "frontier.json"
    found: dict[str, Any] = json.loads(kept.read_text()) if kept.is_file() else {}
    source = work / "float32"
    expand = ["--dequantize", "--dtype", "float32"]
    if not source.is_dir() and (reason := convert(resolve(args.model), source, expand)):
        sys.exit(f"{args.model} could not be expanded: {reason}")
    reference, tokenizer = load(source)
    for name, family, options in schemes():
        if name in found or (args.only and not any(part in name for part in args.only)):
            continue
        folder, started = work / "result", time.perf_counter()
        shutil.rmtree(folder, ignore_errors=True)
        # float16 is the type of scales and norms.
        reason = convert(source, folder, [*options, "--dtype", "float16"], args.limit)
        took = time.perf_counter() - started
        figures = {"left out": reason} if reason else measure(folder, tokenizer, reference, args.tokens)
        found[name] = {"family": family, "seconds": took} | figures
        kept.write_text(json.dumps(found, indent=1))
        print(f"{name}: {reason or found[name]['kl']['mean']}, {took:.0f} s", file=sys.stderr, flush=True)
    shutil.rmtree(work / "result", ignore_errors=True)
    return found


def plot(found: dict[str, Any], title: str, path: Path) -> None:
    """KL divergence, and perplexity, against bytes."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, 2, figsize=(15, 6), layout="constrained")
    first = next(iter(found.values()))
    for axis, label in zip(axes, ("KL from the reference, nats", "perplexity"), strict=True):
        for family in FAMILIES:
            rows = [(name, row) for name, row in found.items() if row["family"] == family]
            if not rows:
                continue
            rows.sort(key=lambda item: item[1]["file_bytes"])
            sizes = [row["file_bytes"] / 1e6 for _, row in rows]
            values = [row["kl"]["mean"] if axis is axes[0] else row["perplexity"] for _, row in rows]
            joined = "-" if family.startswith("affine") else ""
            axis.plot(sizes, values, marker="o", markersize=5, linestyle=joined, linewidth=1.2, label=family)
            if not joined:
                for i, ((name, _), x, y) in enumerate(zip(rows, sizes, values, strict=True)):
                    side = ("right", "bottom") if i % 2 else ("left", "top")
                    axis.annotate(f" {name} ", (x, y), fontsize=7, ha=side[0], va=side[1], clip_on=True)
        axis.set(xlabel="weight files, MB", ylabel=label, yscale="log")
        axis.grid(which="major", alpha=0.3)
    lowest = first["reference"]["perplexity"]
    axes[1].axhline(lowest, color="grey", linestyle=":", linewidth=1)
    axes[1].set_ylim(0.95 * lowest, 12 * lowest)  # what lies above is no model any more
    for ticks in (axes[1].yaxis.set_major_formatter, axes[1].yaxis.set_minor_formatter):
        ticks(lambda y, _: f"{y:,g}")
    axes[0].legend(fontsize=8)
    figure.suptitle(title, fontsize=9)
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="demo")
    parser.add_argument("--work", type=Path, required=True, help="folder for what is made on the way, 0.7 GB")
    parser.add_argument("--tokens", type=int, default=4096)
    parser.add_argument("--limit", type=float, default=900, help="seconds that one conversion may take")
    parser.add_argument("--only", nargs="+", metavar="PART", help="schemes whose name holds one of these")
    parser.add_argument("--plot", type=Path)
    args = parser.parse_args()
    found = run(args)
    about = f"{machine_line()} · {args.model} · {args.tokens:,} tokens"
    done = {name: row for name, row in found.items() if "left out" not in row}
    print(about + "\n")
    rows = [
        [
            name,
            f"{row['file_bytes'] / 1e6:.1f}",
            f"{row['bits']:.2f}",
            f"{row['perplexity']:.3f} ± {row['perplexity_stderr']:.3f}",
            f"{row['kl']['mean']:.5f} ± {row['kl']['stderr']:.5f}",
            f"{row['top1_agreement']['mean']:.1%}",
        ]
        for name, row in sorted(done.items(), key=lambda item: item[1]["file_bytes"])
    ]
    table(["scheme", "MB", "bits a weight", "perplexity", "KL", "top-1"], rows)
    if done:
        print(f"\nThe reference's perplexity: {next(iter(done.values()))['reference']['perplexity']:.3f}")
    for name, row in found.items():
        if "left out" in row:
            print(f"{name} left out: {row['left out']}")
    if args.plot and done:
        plot(done, about, args.plot)


if __name__ == "__main__":
    main()
