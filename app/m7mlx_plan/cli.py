"""What a model takes of each of several machines, and what goes over the wire: `m7mlx-plan`.

From headers and arithmetic alone. Times are a model, not a measurement: the weights of a rank over the bandwidth of
its memory, and for every exchange its hops times the link's latency, and its bytes over the link's bandwidth.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass

from m7mlx.command import ArgumentParser, gigabytes, run
from m7mlx.config import ModelConfig
from m7mlx.errors import ConfigError, InputError, NotFoundError
from m7mlx.files.hub import ALIASES, find_local
from m7mlx.files.weights import DTYPES, folder_weights, head_as_stored, is_left_out, parameters, refuse_adapter
from m7mlx.jsonfile import said
from m7mlx.memory import CHAT_SLACK, cache_bytes
from m7mlx.shard import MODES, Mode, Shard
from m7mlx.terminal import json_line

PROG = "m7mlx-plan"
_EFFICIENCY = 0.65  # of the memory bandwidth, as published decoding figures have it (docs/performance.md)
_DESCRIPTION = """\
How a model would lie on several machines: memory of each, bytes and exchanges a token, and about how fast that is.
Nothing is fetched; the aliases of Mistral 7B (mistral, …) need not be here."""
_EPILOG = """\
examples:
  m7mlx-plan mistral                                            1, 2, 4 and 8 Macs, over Thunderbolt with RDMA
  m7mlx-plan mistral --bits 16 --ranks 2 --link 10gbe           16-bit weights on two machines
  m7mlx-plan ~/models/mine --tokens 32768 --rows 8 --memory 16  eight conversations at once, 16 GB a machine

Tensor parallel exchanges twice a layer: for links with a latency of microseconds. Pipeline parallel exchanges once a
machine: for any link, but a token still waits for all layers. Exit status: 0, 2 bad usage or input."""


@dataclass(frozen=True)
class Link:
    """How machines are connected: seconds that a message takes, bytes a second, and whether all reach all at once."""

    latency: float
    bandwidth: float
    is_mesh: bool = False


# Latencies as reported for macOS 26.2: 300 µs through TCP, 3 to 50 µs by RDMA (Apple TN3205 and users' measurements).
LINKS = {
    "rdma": Link(10e-6, 7e9, is_mesh=True),
    "thunderbolt": Link(300e-6, 3e9),
    "10gbe": Link(300e-6, 1.1e9),
    "1gbe": Link(300e-6, 0.11e9),
}


@dataclass(frozen=True)
class Estimate:
    """One way to divide a model.

    weights, cache  bytes of the machine that has most
    sent            bytes that a machine sends for a token at most; exchanges, how often all wait for each other
    seconds         of a token, as the model above has it
    """

    mode: Mode
    ranks: int
    weights: int
    cache: int
    sent: int
    exchanges: int
    seconds: float


def estimate(
    whole: ModelConfig,
    tensors: dict[str, tuple[tuple[int, ...], int]],
    mode: Mode,
    ranks: int,
    link: Link,
    *,
    positions: int,
    rows: int = 1,
    memory_bandwidth: float = 273e9,
) -> Estimate:
    """For weights given as {name: (shape, bytes)}, and rows of so many tokens in 16 bits. Raises ConfigError."""
    shards = [Shard(mode, rank, ranks) for rank in range(ranks)]
    caches = [rows * cache_bytes(shard.config(whole), positions) for shard in shards]
    weights = [shard.nbytes(tensors, whole) for shard in shards]
    hidden = rows * whole.hidden_size * 2
    hops = 0 if ranks == 1 else 1 if link.is_mesh else 2 * (ranks - 1)  # of an all-reduce
    share = hidden * (ranks - 1) if link.is_mesh else 2 * hidden * (ranks - 1) / ranks
    work = [(w + c) / (memory_bandwidth * _EFFICIENCY) for w, c in zip(weights, caches, strict=True)]
    if mode == "tensor":  # twice a layer, and once about the token
        exchanges = 2 * whole.n_layers + 1 if ranks > 1 else 0
        sent = 2 * whole.n_layers * share
        seconds = max(work) + exchanges * hops * link.latency + sent / link.bandwidth
    else:  # to the next, from the last to all, and about the token
        exchanges = ranks - 1 + 2 if ranks > 1 else 0
        sent = hidden + share if ranks > 1 else 0
        seconds = (
            sum(work) + ((ranks - 1) + 2 * hops) * link.latency + ((ranks - 1) * hidden + share) / link.bandwidth
        )
    return Estimate(mode, ranks, max(weights), max(caches), math.ceil(sent), exchanges, seconds)


def stored(name: str, bits: int | None) -> tuple[ModelConfig, dict[str, tuple[tuple[int, ...], int]]]:
    """Configuration and tensors of a model on this machine, or of Mistral 7B; in so many bits a weight, or as is."""
    folder = find_local(name)
    if folder is not None and folder.is_dir():
        refuse_adapter(folder)
        config = ModelConfig.from_folder(folder)
        if bits is None:
            found = folder_weights(folder)
            config = head_as_stored(folder, config, found)
            parameters(folder, config, found)
            headers = {n: t for n, t in found.items() if not is_left_out(n, config)}
            return config, {n: (t.shape, math.prod(t.shape) * DTYPES[t.dtype].size) for n, t in headers.items()}
    elif name in ALIASES:
        config = ModelConfig.from_dict({"model_type": "mistral", "vocab_size": 32768, "sliding_window": None})
    else:
        raise NotFoundError(
            f"{said(name)} is not on this machine, and a plan fetches nothing; take a folder, or mistral"
        )
    width = (bits or 4) + (0.5 if (bits or 4) < 16 else 0)  # scales and biases, in groups of 64
    shapes = config.weight_shapes().items()
    return config, {n: (s, int(math.prod(s) * (width if len(s) == 2 else 16) / 8)) for n, s in shapes}


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit status."""
    parser = ArgumentParser(PROG, _DESCRIPTION, _EPILOG)
    parser.add_argument("model", nargs="?", default="mistral", metavar="MODEL", help="folder or alias (mistral)")
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 2, 4, 8], metavar="N", help="machines (1 2 4 8)")
    parser.add_argument("--bits", type=int, choices=(4, 8, 16), help="as if its weights had so many bits")
    parser.add_argument("--tokens", type=int, metavar="N", help="tokens of a conversation (the window, or 4,096)")
    parser.add_argument("--rows", type=int, default=1, metavar="N", help="conversations at a time (%(default)s)")
    parser.add_argument("--link", choices=LINKS, default="rdma", help="what connects the machines (%(default)s)")
    parser.add_argument("--bandwidth", type=float, default=273.0, metavar="GB/S", help="of memory (273: an M4 Pro)")
    parser.add_argument("--memory", type=gigabytes, metavar="GB", help="of a machine: mark what does not fit")
    parser.add_argument("--json", action="store_true", help="an object a line")
    return run(_plan, parser.parse_args(argv), PROG)


def _plan(args: argparse.Namespace) -> None:
    given = {"--tokens": args.tokens, "--rows": args.rows, "--bandwidth": args.bandwidth}
    for option, value in given.items():
        if value is not None and not 0 < value < 1 << 40:  # nor NaN
            raise InputError(f"{option} must be above 0, not {value}")
    if not all(0 < ranks <= 1024 for ranks in args.ranks):
        raise InputError("--ranks: a number of machines lies between 1 and 1,024")
    config, tensors = stored(args.model, args.bits)
    seen = config.sliding_window and config.sliding_window + CHAT_SLACK
    tokens = args.tokens or config.sliding_window or min(4096, config.max_position_embeddings)
    positions = min(seen or tokens, tokens)
    if not args.json:
        print(f"{args.model}: {tokens:,} tokens, {args.rows} at a time, over {args.link}; tok/s are an estimate\n")
        print(f"{'':14}{'weights':>10}{'cache':>10}{'sent a token':>14}{'exchanges':>11}{'tok/s':>8}")
    for mode in MODES:
        for ranks in args.ranks:
            label = f"{mode} × {ranks}"
            try:
                found = estimate(
                    *(config, tensors, mode, ranks, LINKS[args.link]),
                    positions=positions,
                    rows=args.rows,
                    memory_bandwidth=args.bandwidth * 1e9,
                )
            except ConfigError as error:
                print(
                    json_line({"mode": mode, "ranks": ranks, "error": str(error)})
                    if args.json
                    else f"{label}: {error}"
                )
                continue
            if args.json:
                print(json_line(asdict(found)))
                continue
            fits = args.memory is None or found.weights + found.cache < args.memory
            print(
                f"{label:14}{found.weights / 1e9:7.2f} GB{found.cache / 1e9:7.2f} GB{found.sent / 1e3:11.1f} kB"
                f"{found.exchanges:11}{args.rows / found.seconds:8.1f}{'' if fits else '   does not fit'}"
            )
