"""The command line of m7mlx-chat: which of its two faces to show, and with which settings."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from m7mlx.cli import ArgumentParser, run

PROG = "m7mlx-chat"
DEFAULT_MODEL = "mistral"
DEFAULT_MAX_TOKENS = 4096
_SLACK = 64  # tokens that can be undone: a stop text, a draft, an answer that was broken off
_DESCRIPTION = """\
Chat with a model on this machine. Nothing leaves it.

In a terminal this opens the chat. With -p, with piped input or with redirected output it prints the answer only."""
_EPILOG = """\
examples:
  m7mlx-chat                                        chat with Mistral-7B-Instruct-v0.3 (4 bits, 4.1 GB, fetched once)
  m7mlx-chat --model demo                           chat with a small model (93 MB)
  m7mlx-chat --model ./my-model --temp 0.7          a folder that m7mlx-convert or mlx-lm wrote
  m7mlx-chat -p "What is the capital of France?"    one answer on stdout
  m7mlx-chat --speculate lookup --kv-bits 8         faster quotes and edits, half the memory per token
  git diff | m7mlx-chat -p "Review this change"     the piped text follows the question

Exit status: 0 answered, 1 failed, 2 bad usage or input, 130 Ctrl-C."""


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit status."""
    parser = _parser()
    args = parser.parse_args(argv)
    return run(_chat, args, PROG)


def _parser() -> argparse.ArgumentParser:
    parser = ArgumentParser(PROG, _DESCRIPTION, _EPILOG)
    parser.add_argument(
        "--model",
        default=DEFAULT_MODEL,
        metavar="NAME",
        help="folder, Hub repository (org/name) or alias: mistral (default), mistral-v0.2, demo",
    )
    parser.add_argument("-p", "--prompt", metavar="QUESTION", help="answer this and leave")
    parser.add_argument("--system", metavar="TEXT", help="system prompt: how the model should behave")
    parser.add_argument(
        "--max-tokens",
        type=int,
        default=DEFAULT_MAX_TOKENS,
        metavar="N",
        help="longest answer (default: %(default)s)",
    )
    memory = parser.add_argument_group("memory of the conversation")
    memory.add_argument("--kv-bits", type=int, choices=(4, 8), help="store keys and values in 4 or 8 bits")
    memory.add_argument(
        "--kv-group-size", type=int, default=64, choices=(32, 64, 128), help="in groups of (default: %(default)s)"
    )
    memory.add_argument(
        "--max-kv-size",
        type=int,
        metavar="N",
        help="models without a window: keep the first 4 and the last N - 4 tokens, and go on for ever",
    )
    parser.add_argument(
        "--speculate",
        default="off",
        metavar="HOW",
        help="same answer, sooner: lookup (text that repeats itself), or a small model of the same family; "
        "off (default)",
    )
    sampling = parser.add_argument_group("sampling (greedy unless --temp is given)")
    sampling.add_argument("--temp", "--temperature", type=float, default=0.0, metavar="T", help="randomness; 0: none")
    sampling.add_argument("--top-p", type=float, default=1.0, metavar="P", help="keep the likeliest tokens up to P")
    sampling.add_argument("--top-k", type=int, default=0, metavar="K", help="keep the K likeliest tokens")
    sampling.add_argument(
        "--min-p", type=float, default=0.0, metavar="P", help="keep tokens P times as likely as the best"
    )
    sampling.add_argument("--repetition-penalty", type=float, default=1.0, metavar="X", help="above 1: repeat less")
    sampling.add_argument("--seed", type=int, metavar="N", help="the same seed gives the same answer")
    parser.add_argument(
        "--stop", action="append", default=[], metavar="TEXT", help="end the answer before TEXT; repeatable"
    )
    return parser


def _chat(args: argparse.Namespace) -> int:
    from m7mlx.errors import InputError
    from m7mlx.sampling import Sampling
    from m7mlx_chat.settings import Settings

    if args.max_tokens < 1:
        raise InputError(f"--max-tokens must be at least 1, not {args.max_tokens}")
    if not all(args.stop):
        raise InputError("--stop needs a text")
    settings = Settings(
        model=args.model,
        system=args.system or "",
        sampling=Sampling(
            temperature=args.temp,
            top_p=args.top_p,
            top_k=args.top_k,
            min_p=args.min_p,
            repetition_penalty=args.repetition_penalty,
            seed=args.seed,
        ),
        max_tokens=args.max_tokens,
        stop=tuple(args.stop),
        cache={
            "slack": _SLACK,
            "kv_bits": args.kv_bits,
            "kv_group_size": args.kv_group_size,
            "max_kv_size": args.max_kv_size,
        },
        speculate=args.speculate,
    )
    if args.prompt is None and sys.stdin and sys.stdin.isatty() and sys.stdout and sys.stdout.isatty():
        from m7mlx_chat.app import run_app

        return run_app(settings)
    from m7mlx_chat.headless import answer

    return answer(settings, args.prompt)
