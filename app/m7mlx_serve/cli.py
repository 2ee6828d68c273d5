"""The command line of m7mlx-serve."""

from __future__ import annotations

import argparse
import gc
import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

from m7mlx.command import (
    EXIT_FAILED,
    EXIT_INTERRUPTED,
    ArgumentParser,
    add_kv_bits,
    add_parallel,
    gigabytes,
    run,
    say,
)
from m7mlx.errors import InputError, RunError
from m7mlx.parallel.launch import is_launched
from m7mlx.units import in_gigabytes
from m7mlx_serve.address import bind, in_url, is_loopback, listen

if TYPE_CHECKING:
    from m7mlx.parallel.world import World  # what it imports takes longer than --help

PROG = "m7mlx-serve"
_LOOPBACK = ("127.0.0.1", "localhost", "::1")
_DESCRIPTION = """\
Serve a model to many programs at once, by OpenAI's API, and a chat page to a browser on this machine.

The server answers this machine alone. To listen on any other address it needs a key, which clients
send as `Authorization: Bearer …`."""
_EPILOG = """\
examples:
  m7mlx-serve --model demo                                     http://127.0.0.1:8080/v1, and a page at /
  m7mlx-serve --model mistral --rows 16 --kv-bits 8            sixteen answers at a time, in half the memory
  m7mlx-serve --host 0.0.0.0 --api-key-file ~/.config/m7mlx/key --allow-host studio.local
  mlx.launch --hostfile macs.json -- "$(which m7mlx-serve)" --model mistral      one model over several Macs

Memory is bounded by rows × window, and printed at the start. Exit status: 1 failed on the way, 2 bad
usage or input, 130 Ctrl-C."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns its exit status."""
    return run(_serve, _parse(argv), PROG)


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = ArgumentParser(PROG, _DESCRIPTION, _EPILOG)
    parser.add_argument(
        "--model",
        default="mistral",
        metavar="MODEL",
        help="a folder, a Hub repository or an alias (%(default)s)",
    )
    parser.add_argument("--name", metavar="NAME", help="what clients call the model (default: MODEL)")
    net = parser.add_argument_group("network")
    net.add_argument("--host", default="127.0.0.1", metavar="ADDRESS", help="address to listen on (%(default)s)")
    net.add_argument("--port", type=int, default=8080, metavar="N", help="port (%(default)s); 0 takes a free one")
    net.add_argument("--api-key-file", type=Path, metavar="FILE", help="a file with a key in its first line")
    net.add_argument(
        "--allow-host",
        action="append",
        default=[],
        metavar="NAME",
        help="a further name that clients reach this server by; repeatable",
    )
    net.add_argument(
        "--allow-origin",
        action="append",
        default=[],
        metavar="ORIGIN",
        help="pages that may ask besides the server's own, as app://obsidian.md; repeatable",
    )
    limits = parser.add_argument_group("limits")
    limits.add_argument("--rows", type=int, default=8, metavar="N", help="answers at a time (%(default)s)")
    limits.add_argument(
        "--queue",
        type=int,
        default=64,
        metavar="N",
        help="requests that may wait (%(default)s); further ones get status 429",
    )
    limits.add_argument(
        "--keep",
        type=int,
        default=8,
        metavar="N",
        help="ended conversations that are kept for those that begin alike (%(default)s)",
    )
    add_kv_bits(limits)
    limits.add_argument("--max-tokens", type=int, metavar="N", help="most tokens in an answer")
    limits.add_argument(
        "--max-seconds",
        type=float,
        default=600.0,
        metavar="S",
        help="most seconds for an answer (%(default)g)",
    )
    limits.add_argument(
        "--max-memory",
        type=gigabytes,
        metavar="GB",
        help="refuse to load a model that needs more memory",
    )
    add_parallel(parser)
    return parser.parse_args(argv)


def _serve(args: argparse.Namespace) -> int | None:
    # Imported here, so that --help answers at once and needs no extra.
    try:
        from m7mlx_serve.app import Served, Server
        from m7mlx_serve.listener import BACKLOG, Listener
        from m7mlx_serve.readers import Readers
    except ImportError as error:
        raise InputError(f"{PROG} needs the extra server ({error.name}): pip install 'm7mlx[server]'") from None
    from m7mlx.config import ModelConfig
    from m7mlx.files.hub import resolve
    from m7mlx.memory import limit_memory
    from m7mlx.parallel.world import join, run_rank
    from m7mlx_serve.engine import Engine
    from m7mlx_serve.errors import report
    from m7mlx_serve.limits import Limits, rows_memory

    _check_numbers(args)
    key = _read_key(args.api_key_file)
    hosts = _host_names(args.host, args.allow_host, key)
    if args.max_memory is not None:
        limit_memory(args.max_memory)
    limits = Limits(args.rows, args.queue, args.keep, args.kv_bits)
    # A port that is taken is told before the model loads, which may take minutes. Of several
    # processes, only the first opens it.
    bound = None if is_launched() else bind(args.host, args.port)
    folder = resolve(args.model)
    world = join(args.parallel, lambda: ModelConfig.from_folder(folder))
    if world is not None and world.rank:
        return run_rank(world, folder)
    bound = bound or bind(args.host, args.port)
    listener: Listener | None = None

    def stop() -> None:
        if listener is not None:
            listener.should_exit = True

    served = Served(args.name or args.model, args.max_tokens, args.max_seconds)
    engine, readers = Engine(folder, limits, world, failed=stop), Readers(folder, served.model)
    readers.start()
    say(f"loading {args.model} …")
    try:
        engine.start()
    except KeyboardInterrupt:  # loading goes on, and would abort a process that ends as usual
        _leave(EXIT_INTERRUPTED, "stopped while loading")
    try:
        most = rows_memory(engine.model, limits)
        server = Server(engine, readers, served, hosts, key, _origins(args.allow_origin))
        gc.collect()
        gc.freeze()  # what exists now stays: each look through it would take a tenth of a second
        listen(bound, BACKLOG)
        url = f"http://{in_url(args.host)}:{bound.getsockname()[1]}"
        say(f"m7mlx is at {url} · {_describe_memory(engine.model.nbytes, most, world)} · Ctrl-C ends it")
        listener = Listener(server.app, engine.close)
        if engine.alive:
            listener.run(sockets=[bound])
    finally:
        readers.close()
        if not engine.close():
            _leave(EXIT_FAILED, "ended in the middle of a forward pass that took too long")
    if engine.failure is not None:
        report(engine.failure)
        raise RunError("the thread that computes has ended, which must not happen; start the server again")
    return None


def _describe_memory(weights: int, keys: int, world: World | None) -> str:
    """The bytes of weights, and of keys and values, in words."""
    memory = f"{in_gigabytes(weights, 2)} of weights, at most {in_gigabytes(keys, 2)} of keys and values"
    if world is None:
        return memory
    return f"{memory} in each of {world.size} processes ({world.shard.mode} parallel)"


def _check_numbers(args: argparse.Namespace) -> None:
    """Raise InputError for a number that is out of range."""
    for name, low in (("rows", 1), ("queue", 0), ("keep", 0)):
        if not low <= getattr(args, name) <= 1024:
            raise InputError(f"--{name} must lie between {low} and 1024, not {getattr(args, name)}")
    if args.max_tokens is not None and args.max_tokens < 1:
        raise InputError(f"--max-tokens must be at least 1, not {args.max_tokens}")
    if not 0 < args.max_seconds <= 86_400:
        raise InputError(f"--max-seconds must lie between 0 and 86400, not {args.max_seconds:g}")
    if not 0 <= args.port < 1 << 16:
        raise InputError(f"--port must lie between 0 and 65535, not {args.port}")


def _leave(status: int, why: str) -> NoReturn:
    """End the process at once, whatever other threads do."""
    say(f"{PROG}: {why}")
    os._exit(status)


def _read_key(path: Path | None) -> str | None:
    """The key in the file's first line, or None without a file."""
    if path is None:
        return None
    try:
        lines = path.expanduser().read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"--api-key-file: {path} cannot be read ({error})") from None
    key = lines[0].strip() if lines else ""
    if len(key) < 16 or not key.isascii() or not key.isprintable():
        raise InputError(f"--api-key-file: the first line of {path} must be a key of at least 16 ASCII characters")
    return key


def _origins(allowed: Sequence[str]) -> set[str]:
    """The origins of pages that may ask. Raises InputError for what is none."""
    for origin in allowed:
        if not re.fullmatch(r"[A-Za-z][A-Za-z0-9+.-]*://[^/?#\s]+", origin):
            raise InputError(f"--allow-origin {origin}: an origin is a scheme and a host, as https://example.org")
    return {origin.lower() for origin in allowed}


def _host_names(host: str, allowed: Sequence[str], key: str | None) -> set[str]:
    """The names that Host headers may have. Raises InputError if `host` needs a key."""
    if key is None and not is_loopback(host):
        raise InputError(f"--host {host} can be reached from other machines: give a key with --api-key-file")
    names = {*_LOOPBACK, "[::1]", host.lower(), f"[{host.lower()}]"} - {"0.0.0.0", "::", "[::]"}
    return names | {name.lower() for name in allowed}
