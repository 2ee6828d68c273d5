"""The command line of m7mlx-convert."""

from __future__ import annotations

import argparse
import signal
import sys
from collections.abc import Sequence
from pathlib import Path
from types import FrameType

from m7mlx.cli import ArgumentParser, run

PROG = "m7mlx-convert"
_DESCRIPTION = """\
Convert a model to an MLX folder that m7mlx-chat, m7mlx and mlx-lm load.

SOURCE is a Hub repository ("mistralai/Mistral-7B-Instruct-v0.3"), a folder in Hugging Face's layout (one or many
safetensors files) or a GGUF file. Weights stream through memory one tensor at a time."""
_EPILOG = """\
examples:
  m7mlx-convert mistralai/Mistral-7B-Instruct-v0.3 --q-bits 4
  m7mlx-convert ~/models/my-finetune --q-bits 8 --mlx-path my-finetune-8bit
  m7mlx-convert mistral-7b-instruct.Q4_0.gguf
  m7mlx-convert mistralai/Mistral-7B-Instruct-v0.2 --dtype float16 --mlx-path ~/models/mistral-fp16
  m7mlx-convert --hf-path HuggingFaceH4/zephyr-7b-beta -q

The result appears under its name only when it is whole; an existing one is replaced only with --force.
Exit status: 0 done, 1 failed on the way, 2 bad usage or input, 130 Ctrl-C."""


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit status."""
    args = _parse(argv)
    signal.signal(signal.SIGTERM, _interrupt)  # `kill` cleans up as Ctrl-C does
    return run(_convert, args, PROG)


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = ArgumentParser(PROG, _DESCRIPTION, _EPILOG)
    parser.add_argument("source", nargs="?", metavar="SOURCE", help="Hub repository, folder or GGUF file")
    parser.add_argument("--hf-path", metavar="SOURCE", help="the same, as mlx-lm spells it")
    parser.add_argument(
        "--mlx-path", metavar="OUT", help="folder to write (default: ./<name>-mlx or ./<name>-<N>bit)"
    )
    parser.add_argument("--revision", help="branch, tag or commit of a Hub repository")
    parser.add_argument("--q-bits", type=int, choices=(2, 3, 4, 5, 6, 8), help="quantise to this many bits a weight")
    parser.add_argument("-q", "--quantize", action="store_true", help="quantise to 4 bits, as mlx-lm spells it")
    parser.add_argument(
        "--q-group-size", type=int, choices=(32, 64, 128), help="weights that share a scale (default: 64)"
    )
    parser.add_argument(
        "--dtype",
        choices=("float16", "bfloat16", "float32"),
        help="type of what is not quantised (default: the source's)",
    )
    parser.add_argument("--force", action="store_true", help="replace OUT if it exists")
    parser.add_argument("--quiet", action="store_true", help="no progress bar")
    args = parser.parse_args(argv)
    if bool(args.source) == bool(args.hf_path):
        parser.error("give one SOURCE" if not args.source else "give SOURCE or --hf-path, not both")
    args.source = args.source or args.hf_path
    args.q_bits = args.q_bits or (4 if args.quantize else None)
    if args.q_group_size and not args.q_bits:
        parser.error("--q-group-size needs --q-bits")
    return args


def _convert(args: argparse.Namespace) -> None:
    from m7mlx.quantization import Quantization
    from m7mlx_convert.convert import convert

    local = Path(args.source).expanduser()
    command = [PROG, local.resolve().name if local.exists() else args.source]  # for the card: no private paths
    for flag in ("revision", "q_bits", "q_group_size", "dtype"):
        if getattr(args, flag):
            command += ["--" + flag.replace("_", "-"), str(getattr(args, flag))]
    folder = convert(
        args.source,
        args.mlx_path,
        quantization=Quantization(args.q_group_size or 64, args.q_bits) if args.q_bits else None,
        dtype=args.dtype,
        revision=args.revision,
        force=args.force,
        progress=not args.quiet and sys.stderr.isatty(),
        command=command,
    )
    print(folder)


def _interrupt(signum: int, frame: FrameType | None) -> None:
    raise KeyboardInterrupt
