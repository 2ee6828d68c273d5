"""The command line of m7mlx-serve."""

from __future__ import annotations

import argparse
import gc
import ipaddress
import os
import socket
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

from m7mlx.command import EXIT_FAILED, EXIT_INTERRUPTED, ArgumentParser, add_parallel, gigabytes, run, say
from m7mlx.errors import InputError, RunError
from m7mlx.parallel.launch import is_launched
from m7mlx.units import in_gigabytes

PROG = "m7mlx-serve"
_LOOPBACK = ("127.0.0.1", "localhost", "::1")
_DESCRIPTION = """\
Serve a model to programs that speak OpenAI's API, many at once, and a chat page to a browser on this machine.

It answers on this machine alone. Any other address needs a key, which clients send as `Authorization: Bearer …`."""
_EPILOG = """\
examples:
  m7mlx-serve --model demo                                     http://127.0.0.1:8080/v1, and a page at /
  m7mlx-serve --model mistral --rows 16 --kv-bits 8            sixteen answers at a time, in half the memory
  m7mlx-serve --host 0.0.0.0 --api-key-file ~/.config/m7mlx/key --allow-host studio.local
  mlx.launch --hostfile macs.json -- "$(which m7mlx-serve)" --model mistral      one model over several Macs

Memory is bounded by rows × window, and printed at the start. Exit status: 1 failed on the way, 2 bad usage or input,
130 Ctrl-C."""


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit status."""
    return run(_serve, _parse(argv), PROG)


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = ArgumentParser(PROG, _DESCRIPTION, _EPILOG)
    parser.add_argument(
        "--model", default="mistral", metavar="MODEL", help="folder, Hub repository or alias (mistral)"
    )
    parser.add_argument("--name", metavar="NAME", help="what clients call it (default: MODEL)")
    net = parser.add_argument_group("network")
    net.add_argument("--host", default="127.0.0.1", metavar="ADDRESS", help="address to listen on (%(default)s)")
    net.add_argument("--port", type=int, default=8080, metavar="N", help="port (%(default)s); 0 takes a free one")
    net.add_argument("--api-key-file", type=Path, metavar="FILE", help="a key, on the file's first line")
    net.add_argument(
        "--allow-host", action="append", default=[], metavar="NAME", help="a name that clients use; repeatable"
    )
    load = parser.add_argument_group("load")
    load.add_argument("--rows", type=int, default=8, metavar="N", help="answers at a time (%(default)s)")
    load.add_argument(
        "--queue", type=int, default=64, metavar="N", help="requests that may wait; more get 429 (%(default)s)"
    )
    load.add_argument(
        "--keep", type=int, default=8, metavar="N", help="ended conversations kept for reuse (%(default)s)"
    )
    load.add_argument("--kv-bits", type=int, choices=(4, 8), help="store keys and values in 4 or 8 bits")
    load.add_argument("--max-tokens", type=int, metavar="N", help="longest answer")
    load.add_argument(
        "--max-seconds", type=float, default=600.0, metavar="S", help="longest time for one (%(default)g)"
    )
    load.add_argument("--max-memory", type=gigabytes, metavar="GB", help="load no model beyond it")
    add_parallel(parser)
    return parser.parse_args(argv)


def _serve(args: argparse.Namespace) -> int | None:
    try:
        from m7mlx_serve.app import Served, Server
        from m7mlx_serve.listen import BACKLOG, Listener
        from m7mlx_serve.readers import Readers
    except ImportError as error:
        raise InputError(f"{PROG} needs the extra server ({error.name}): pip install 'm7mlx[server]'") from None
    from m7mlx.config import ModelConfig
    from m7mlx.files.hub import resolve
    from m7mlx.memory import limit_memory
    from m7mlx.parallel.world import join, run_rank
    from m7mlx_serve.engine import Engine, Limits, rows_memory
    from m7mlx_serve.guard import report

    for name, low in (("rows", 1), ("queue", 0), ("keep", 0)):
        if not low <= getattr(args, name) <= 1024:
            raise InputError(f"--{name} must lie between {low} and 1024, not {getattr(args, name)}")
    if args.max_tokens is not None and args.max_tokens < 1:
        raise InputError(f"--max-tokens must be at least 1, not {args.max_tokens}")
    if not 0 < args.max_seconds <= 86_400:
        raise InputError(f"--max-seconds must lie between 0 and 86400, not {args.max_seconds:g}")
    if not 0 <= args.port < 1 << 16:
        raise InputError(f"--port must lie between 0 and 65535, not {args.port}")
    key = _key(args.api_key_file)
    hosts = _hosts(args.host, args.allow_host, key)
    if args.max_memory is not None:
        limit_memory(args.max_memory)
    limits = Limits(args.rows, args.queue, args.keep, args.kv_bits)
    # Before the model, which may take minutes, a port that is taken is told; but only the first of several takes it.
    bound = None if is_launched() else _bound(args.host, args.port)
    folder = resolve(args.model)
    world = join(args.parallel, lambda: ModelConfig.from_folder(folder))
    if world is not None and world.rank:
        return run_rank(world, folder)
    bound = bound or _bound(args.host, args.port)
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
    except KeyboardInterrupt:  # what loads cannot be stopped, and would abort a process that ends in its own way
        _leave(EXIT_INTERRUPTED, "stopped while loading")
    try:
        most = rows_memory(engine.model, limits)
        server = Server(engine, readers, served, hosts, key)
        gc.collect()
        gc.freeze()  # what is there now, stays: looking through it now and then takes a tenth of a second
        _listen(bound, BACKLOG)
        memory = (
            f"{in_gigabytes(engine.model.nbytes, 2)} of weights, at most {in_gigabytes(most, 2)} of keys and values"
        )
        if world is not None:
            memory += f" in each of {world.size} processes ({world.shard.mode} parallel)"
        host = f"[{args.host}]" if ":" in args.host else args.host
        say(f"m7mlx is at http://{host}:{bound.getsockname()[1]} · {memory} · Ctrl-C ends it")
        listener = Listener(server.app, engine.close)
        if engine.alive:
            listener.run(sockets=[bound])
    finally:
        readers.close()
        if not engine.close():
            _leave(EXIT_FAILED, "ended in the middle of a pass that took too long")
    if engine.failure is not None:
        report(engine.failure)
        raise RunError("the thread that computes has ended, which must not happen; start the server again")
    return None


def _leave(status: int, why: str) -> NoReturn:
    """End at once, whatever other threads do."""
    say(f"{PROG}: {why}")
    os._exit(status)


def _bound(host: str, port: int) -> socket.socket:
    """A socket that nobody else gets; connections are refused until it listens."""
    bound = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET)
    try:
        bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # also just after another server's end
        if bound.family == socket.AF_INET6:
            bound.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
        bound.bind((host, port))
    except OSError as error:
        bound.close()
        raise _taken(host, port, error) from None
    return bound


def _listen(bound: socket.socket, waiting: int) -> None:
    try:
        bound.listen(waiting)
    except OSError as error:  # another that was starting at the same time has been faster
        host, port = bound.getsockname()[:2]
        raise _taken(host, port, error) from None


def _taken(host: str, port: int, error: OSError) -> RunError:
    host = f"[{host}]" if ":" in host else host
    return RunError(f"{host}:{port} cannot be opened ({error.strerror or error}); choose another with --port")


def _key(path: Path | None) -> str | None:
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


def _hosts(host: str, allowed: Sequence[str], key: str | None) -> set[str]:
    """The names that Host headers may have."""
    try:
        loopback = host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        loopback = False
    if not loopback and key is None:
        raise InputError(f"--host {host} can be reached from other machines: give a key with --api-key-file")
    names = {*_LOOPBACK, "[::1]", host.lower(), f"[{host.lower()}]"} - {"0.0.0.0", "::", "[::]"}
    return names | {name.lower() for name in allowed}
