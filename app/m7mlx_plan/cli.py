"""The command line of m7mlx-plan."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import asdict

from m7mlx.command import ArgumentParser, add_json, gigabytes, run
from m7mlx.errors import ConfigError, InputError
from m7mlx.memory import UNDO_SLACK, planned_length
from m7mlx.shard import MODES
from m7mlx.terminal import print_event
from m7mlx.units import counted, in_gigabytes
from m7mlx_plan.estimate import NETWORKS, Estimate, estimate
from m7mlx_plan.weights import list_weights

PROG = "m7mlx-plan"
_DESCRIPTION = """\
How a model would lie on several machines: memory of each, bytes and exchanges a token, and about how
fast that is. Weights are taken as they are stored, keys and values in 16 bits. Nothing is fetched;
a model with an alias (mistral, ministral-8b, …) need not be here."""
_EPILOG = """\
examples:
  m7mlx-plan mistral                       1, 2, 4 and 8 Macs, over Thunderbolt with RDMA
  m7mlx-plan mistral --bits 16 --ranks 2 --link 10gbe
                                           16-bit weights on two machines
  m7mlx-plan ~/models/mine --tokens 32768 --rows 8 --memory 16
                                           eight conversations at once, 16 GB a machine

Tensor parallel exchanges twice a layer: for links with a latency of microseconds. Pipeline parallel
exchanges once a machine: for any link, but a token still waits for all layers.
Exit status: 0 done, 2 bad usage or input, 130 Ctrl-C."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; return its exit status."""
    parser = ArgumentParser(PROG, _DESCRIPTION, _EPILOG)
    add = parser.add_argument
    add("model", nargs="?", default="mistral", metavar="MODEL", help="folder or alias (mistral)")
    add("--ranks", type=int, nargs="+", default=[1, 2, 4, 8], metavar="N", help="machines (1 2 4 8)")
    add("--bits", type=int, choices=(4, 8, 16), help="as if its weights had so many bits")
    add("--tokens", type=int, metavar="N", help="tokens of a conversation (the window, or 4,096)")
    add("--rows", type=int, default=1, metavar="N", help="conversations at a time (%(default)s)")
    add("--link", choices=NETWORKS, default="rdma", help="what connects the machines (%(default)s)")
    add("--bandwidth", type=float, default=273.0, metavar="GB/S", help="of memory (273: an M4 Pro)")
    add("--memory", type=gigabytes, metavar="GB", help="of a machine: mark what does not fit")
    add_json(parser)
    return run(_plan, parser.parse_args(argv), PROG)


def _plan(args: argparse.Namespace) -> None:
    given = {"--tokens": args.tokens, "--rows": args.rows, "--bandwidth": args.bandwidth}
    for option, value in given.items():
        if value is not None and not 0 < value < 1 << 40:  # nor NaN
            raise InputError(f"{option} must be above 0, not {value}")
    if not all(0 < ranks <= 1024 for ranks in args.ranks):
        raise InputError("--ranks: a number of machines lies between 1 and 1,024")
    config, tensors = list_weights(args.model, args.bits)
    tokens = args.tokens or planned_length(config)
    window = config.window
    positions = min(window + UNDO_SLACK, tokens) if window else tokens
    if not args.json:
        at_a_time = f"{counted(tokens, 'token')}, {args.rows} at a time"
        print(f"{args.model}: {at_a_time}, over {args.link}; tok/s are an estimate\n")
        print(f"{'':14}{'weights':>10}{'cache':>10}{'sent a token':>14}{'exchanges':>11}{'tok/s':>8}")
    for mode in MODES:
        for ranks in args.ranks:
            try:
                found = estimate(
                    config,
                    tensors,
                    mode,
                    ranks,
                    NETWORKS[args.link],
                    positions=positions,
                    rows=args.rows,
                    memory_bandwidth=args.bandwidth * 1e9,
                )
            except ConfigError as error:
                if args.json:
                    print_event("estimate", mode=mode, ranks=ranks, error=str(error))
                else:
                    print(f"{mode} × {ranks}: {error}")
                continue
            if args.json:
                print_event("estimate", **asdict(found))
            else:
                print(_line(found, args))


def _line(found: Estimate, args: argparse.Namespace) -> str:
    """Write one row of the table."""
    fits = args.memory is None or found.weights + found.cache < args.memory
    return (
        f"{f'{found.mode} × {found.ranks}':14}{in_gigabytes(found.weights, 2):>10}"
        f"{in_gigabytes(found.cache, 2):>10}{found.sent / 1e3:11.1f} kB{found.exchanges:11}"
        f"{args.rows / found.seconds:8.1f}{'' if fits else '   does not fit'}"
    )
