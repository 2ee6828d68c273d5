"""The command line of m7mlx-bench.

Each function imports what it needs: help and wrong options do not wait for the rest.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from m7mlx.command import EXIT_FAILED, ArgumentParser, add_json, positive, run
from m7mlx.errors import ConfigError, InputError
from m7mlx.units import counted

if TYPE_CHECKING:
    from m7mlx.config import ModelConfig
    from m7mlx_bench.progress import Show

PROG = "m7mlx-bench"
_DESCRIPTION = """\
Measure a model on this machine: start to first token, prefill, decode by position, memory; against
other engines in the same run, each in processes of its own that take turns.

MODEL is a folder, a Hub repository or an alias, as for m7mlx-chat; or leave it out and measure random
weights of a shape (--shape), which cost the same as a trained model's."""
_EPILOG = """\
examples:
  m7mlx-bench demo                                    the demo model, every engine that is installed
  m7mlx-bench --shape small --positions 1024 32768    4 layers, far into a conversation
  m7mlx-bench --shape 7b --q-bits 4                   Mistral 7B's size, without its weights
  m7mlx-bench --shape 7b --q-bits 4 --engines m7mlx,llama.cpp --against llama.cpp --prompt 34 512
  m7mlx-bench ~/models/Mistral-7B-Instruct-v0.3-4bit --gguf ~/models/mistral-7b.Q4_K_M.gguf
  m7mlx-bench demo --rounds 5 --save demo.json --plot demo.svg

Ratios are medians of rounds, since a machine's speed drifts. "Of the limit": the bytes that a token
must move (weights, keys and values), over the memory bandwidth measured in the same run. Every start
is a second one: the files are in memory. Memory counts mapped files, as far as they were read.

Peers: mlx-lm and llama.cpp (llama-cpp-python), which both ignore the window; mlx-lm's rotating cache
put in by hand; transformers (float32, bfloat16). llama.cpp reads the GGUF file that the model comes
from, or a copy of the same numbers, which is written for it.
Exit status: 0 done, 1 failed on the way, 2 bad usage or input, 130 Ctrl-C."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; return its exit status."""
    return run(_bench, _parse(argv), PROG)


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = ArgumentParser(PROG, _DESCRIPTION, _EPILOG)
    parser.add_argument("model", nargs="?", metavar="MODEL", help="folder, Hub repository or alias (default: demo)")
    shape = parser.add_argument_group("random weights instead of a model")
    shape.add_argument(
        "--shape", choices=("small", "135m", "7b"), help="4 layers of 512, the demo model's, Mistral 7B's"
    )
    for name, meaning in (
        ("layers", "layers"),
        ("hidden", "hidden size"),
        ("feed-forward", "size of the feed-forward layers"),
        ("heads", "query heads"),
        ("kv-heads", "key-value heads"),
        ("vocab", "vocabulary"),
    ):
        shape.add_argument(f"--{name}", type=positive, metavar="N", help=f"{meaning}, instead of the shape's")
    shape.add_argument("--window", type=_window, metavar="N", help="sliding window, or none")
    shape.add_argument("--q-bits", type=int, choices=(2, 3, 4, 6, 8), help="quantised, in groups of 64")
    what = parser.add_argument_group("what to measure")
    what.add_argument(
        "--engines",
        metavar="A,B",
        help="which, of: m7mlx, m7mlx compiled, m7mlx kv8, m7mlx kv4, mlx-lm, mlx-lm rotating, transformers, "
        "transformers bf16, llama.cpp (default: those that are installed)",
    )
    what.add_argument("--gguf", type=Path, metavar="FILE", help="the same model for llama.cpp (default: a copy)")
    what.add_argument(
        "--prompt", type=positive, nargs="+", default=[34, 256], metavar="N", help="tokens to read (34 256)"
    )
    what.add_argument(
        "--positions",
        type=positive,
        nargs="+",
        default=[1024, 4096],
        metavar="N",
        help="where to decode (1024 4096)",
    )
    what.add_argument("--tokens", type=positive, default=24, metavar="N", help="tokens to decode at each (24)")
    what.add_argument("--rounds", type=positive, default=3, metavar="N", help="how often, in turn (3)")
    what.add_argument(
        "--seconds",
        type=positive,
        default=30,
        metavar="N",
        help="that one measurement may take; a slow engine is measured once, with fewer tokens (30)",
    )
    out = parser.add_argument_group("results")
    out.add_argument("--against", metavar="ENGINE", default="mlx-lm", help="ratios are to this engine (mlx-lm)")
    out.add_argument("--save", type=Path, metavar="FILE", help="keep all figures of all runs, as JSON")
    out.add_argument("-q", "--quiet", action="store_true", help="do not show what is being done")
    add_json(out)
    out.add_argument("--plot", type=Path, metavar="FILE", action="append", default=[], help="a .png or .svg")
    return parser.parse_args(argv)


def _window(text: str) -> int:
    return 0 if text == "none" else positive(text)


def _bench(args: argparse.Namespace) -> int:
    from m7mlx.files.disk import write_whole
    from m7mlx.terminal import console, print_event
    from m7mlx_bench import report
    from m7mlx_bench.progress import show_progress
    from m7mlx_bench.rounds import Turns
    from m7mlx_bench.worker import Job

    for path in args.plot:
        _check_plot(path)
    for path in [*args.plot, *([args.save] if args.save else [])]:
        if not path.absolute().parent.is_dir():
            raise InputError(f"{path}: there is no folder {path.absolute().parent}")
    engines = _engines(args)
    with (
        tempfile.TemporaryDirectory(prefix="m7mlx-bench-") as made,
        show_progress(PROG, not (args.quiet or args.json)) as show,
    ):
        scratch = Path(made)
        folder, name, config = _model(args, scratch, show)
        results = report.Results(
            model={"name": name, "window": config.sliding_window, "config": config.to_dict()},
            machine=report.machine_facts(),
            prompts=sorted(set(args.prompt)),
            positions=sorted(set(args.positions)),
            tokens=args.tokens,
            against=args.against,
        )
        job = Job(
            engine="",
            folder="",
            prompts=results.prompts,
            positions=results.positions,
            tokens=args.tokens,
            vocab=config.vocab_size,
            seconds=args.seconds,
        )
        turns = Turns(results, job, show)
        for engine in engines:
            turns.add(engine, partial(_find_file, args, engine, folder, scratch, show))
        turns.measure(args.rounds)
    if args.json:
        print_event("result", **results.to_dict())
    else:
        # First, whatever becomes of the files.
        report.show(results, console(width=None if sys.stdout.isatty() else 1000))
    if args.save:
        write_whole(args.save, json.dumps(results.to_dict(), indent=1))
    for path in args.plot:
        from m7mlx_bench.plots import draw_plot

        draw_plot(results, path)
    return 0 if "m7mlx" in results.runs or "m7mlx" not in engines else EXIT_FAILED


def _check_plot(path: Path) -> None:
    """Raise InputError, before an hour has gone by, if the plot could not be drawn."""
    import importlib.util

    from m7mlx_bench.plots import FORMATS

    if path.suffix.lower() not in FORMATS:
        raise InputError(f"{path}: a plot is a {' or '.join(FORMATS)} file")
    if importlib.util.find_spec("matplotlib") is None:
        raise InputError("plots need matplotlib: pip install 'm7mlx[bench]'")


def _engines(args: argparse.Namespace) -> list[str]:
    """Return the engines to measure. Raises InputError for one that cannot be."""
    from m7mlx_bench.engines import DEFAULT, ENGINES, is_available, needed_packages

    if args.gguf and not args.gguf.is_file():
        raise InputError(f"{args.gguf} is not a file")
    if args.against not in ENGINES:
        raise InputError(f"there is no engine {args.against!r}; there are {', '.join(ENGINES)}")
    if args.engines is None:
        return [engine for engine in DEFAULT if is_available(engine)]
    asked = [name.strip() for name in args.engines.split(",")]
    for name in asked:
        if name not in ENGINES:
            raise InputError(f"there is no engine {name!r}; there are {', '.join(ENGINES)}")
        if not is_available(name):
            raise InputError(f"{name} is not installed: pip install {needed_packages(name)}")
    return list(dict.fromkeys(asked))


def _find_file(
    args: argparse.Namespace,
    engine: str,
    folder: Path,
    scratch: Path,
    show: Show,
) -> tuple[Path, str]:
    """Return what an engine is to read, and a note on it. Raises an M7Error if there is nothing."""
    from m7mlx_bench.models import find_gguf, find_readable

    def advance(share: float) -> None:
        show(f"{engine}: writing its copy of the weights, {share:.0%}")

    if engine == "llama.cpp":
        return find_gguf(_given_gguf(args, show), folder, scratch, advance)
    return find_readable(engine, folder, scratch, advance)


def _given_gguf(args: argparse.Namespace, show: Show) -> Path | None:
    """Return the GGUF file that the model is or comes from; None if there is none."""
    if args.gguf:
        return Path(args.gguf)
    if args.shape or _changes(args):
        return None
    if (args.model or "demo") == "demo":
        from m7mlx.files.demo import fetch_demo_gguf

        show("llama.cpp: finding the demo model's GGUF file")
        return fetch_demo_gguf()
    return Path(args.model) if Path(args.model).is_file() else None


def _model(args: argparse.Namespace, scratch: Path, show: Show) -> tuple[Path, str, ModelConfig]:
    """Return the folder to measure, its name and its configuration."""
    from m7mlx.config import ModelConfig
    from m7mlx.files.hub import resolve

    changes = _changes(args)
    if args.shape is None and not changes:
        folder = resolve(args.model or "demo")
        return folder, args.model or "demo", ModelConfig.from_folder(folder)
    if args.model:
        raise InputError("a model has its own shape; leave out either MODEL or the options for random weights")
    from m7mlx_bench.models import SHAPES, write_random

    shape = args.shape or "small"
    try:
        config = replace(SHAPES[shape], **changes)
        config = ModelConfig.from_dict(config.to_dict())  # checks what does not fit together
    except ConfigError as error:
        raise InputError(str(error)) from None
    folder = scratch / "random"
    write_random(folder, config, lambda share: show(f"writing random weights, {share:.0%}"))
    bits = f", {args.q_bits} bits" if args.q_bits else ""
    return (
        folder,
        f"random weights, {shape}{bits}, {counted(config.n_layers, 'layer')} of {config.hidden_size}",
        config,
    )


def _changes(args: argparse.Namespace) -> dict[str, Any]:
    """Return what the options change of a shape."""
    from m7mlx.quantization import Quantization

    fields = {
        "layers": "n_layers",
        "hidden": "hidden_size",
        "feed_forward": "intermediate_size",
        "heads": "n_heads",
        "kv_heads": "n_kv_heads",
        "vocab": "vocab_size",
    }
    changes: dict[str, Any] = {field: n for name, field in fields.items() if (n := getattr(args, name)) is not None}
    if args.window is not None:
        changes["sliding_window"] = args.window or None
    if args.q_bits:
        changes["quantization"] = Quantization(64, args.q_bits)
    return changes
