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
from m7mlx.paths import cache_dir, user_path
from m7mlx.units import in_gigabytes
from m7mlx_serve.address import bind, in_url, is_loopback, listen

if TYPE_CHECKING:
    from m7mlx.parallel.world import World  # what it imports takes longer than --help

PROG = "m7mlx-serve"
_MOST_KEYS = 1000
_LOOPBACK = ("127.0.0.1", "localhost", "::1")
_DESCRIPTION = """\
Serve models to many programs at once, by the APIs of OpenAI, Anthropic and Ollama, and a chat page to a
browser on this machine.

The server answers this machine alone. To listen on any other address it needs a key, which clients
send as `Authorization: Bearer …`."""
_LEAST_KEYS = 16  # of a conversation: the sinks, and some to see
_EPILOG = """\
examples:
  m7mlx-serve --model demo                                     http://127.0.0.1:8080/v1, and a page at /
  m7mlx-serve --model mistral --rows 16 --kv-bits 8            sixteen answers at a time, in half the memory
  m7mlx-serve --model mistral-nemo --max-kv-size 16384         prompts of any length, in memory that does not grow
  m7mlx-serve --models-dir ~/models --idle-unload 10m          many models, loaded when they are asked for
  m7mlx-serve --host 0.0.0.0 --api-key-file ~/.config/m7mlx/key --allow-host studio.local
  mlx.launch --hostfile macs.json -- "$(which m7mlx-serve)" --model mistral      one model over several Macs

Memory is bounded by rows × window, and printed at the start. Exit status: 1 failed on the way, 2 bad
usage or input, 130 Ctrl-C."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns its exit status."""
    return run(_serve, _parse(argv), PROG)


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = ArgumentParser(PROG, _DESCRIPTION, _EPILOG)
    models = parser.add_argument_group("models")
    models.add_argument(
        "--model",
        action="append",
        default=[],
        metavar="MODEL",
        help="a folder, a Hub repository or an alias (mistral); repeatable: the first is loaded at the start",
    )
    models.add_argument(
        "--name",
        action="append",
        default=[],
        metavar="NAME",
        help="what clients call the model (default: MODEL); repeatable, one for each --model",
    )
    models.add_argument(
        "--models-dir",
        type=user_path,
        metavar="DIR",
        help="serve all models in this folder, too, each loaded when it is asked for",
    )
    models.add_argument(
        "--idle-unload",
        type=duration,
        metavar="TIME",
        help="unload a model that nobody has used for so long, as 30s, 10m or 2h",
    )
    models.add_argument(
        "--pin",
        action="append",
        default=[],
        metavar="NAME",
        help="load this model at the start and never unload it; repeatable",
    )
    net = parser.add_argument_group("network")
    net.add_argument("--host", default="127.0.0.1", metavar="ADDRESS", help="address to listen on (%(default)s)")
    net.add_argument("--port", type=int, default=8080, metavar="N", help="port (%(default)s); 0 takes a free one")
    net.add_argument("--api-key-file", type=Path, metavar="FILE", help="a file with keys, one a line")
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
    limits.add_argument(
        "--draft-rows",
        type=int,
        default=2,
        metavar="N",
        help="answers at a time that are sped up by looking up what was said before (%(default)s); 0 for none",
    )
    limits.add_argument(
        "--prefix-dir",
        type=user_path,
        metavar="DIR",
        help="where ended conversations are kept on disk ($M7MLX_PREFIXES, or prefixes in the user's cache)",
    )
    limits.add_argument(
        "--prefix-disk",
        type=gigabytes,
        default=8 * 10**9,
        metavar="GB",
        help="how much they may take there (8); 0 keeps none",
    )
    add_kv_bits(limits)
    limits.add_argument(
        "--max-kv-size",
        type=int,
        metavar="N",
        help="models without a window: keep the first 4 and the last N - 4 tokens of a conversation, however long",
    )
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
        help="refuse to load a model that needs more memory; of several, those used last stay within it",
    )
    add_parallel(parser)
    return parser.parse_args(argv)


def _serve(args: argparse.Namespace) -> int | None:
    # Imported here, so that --help answers at once and needs no extra.
    try:
        from m7mlx_serve.app import Served, Server
        from m7mlx_serve.listener import BACKLOG, Listener
    except ImportError as error:
        raise InputError(f"{PROG} needs the extra server ({error.name}): pip install 'm7mlx[server]'") from None
    from m7mlx.config import ModelConfig
    from m7mlx.files.hub import resolve
    from m7mlx.memory import limit_memory
    from m7mlx.parallel.world import join, run_rank
    from m7mlx_serve.catalog import Catalog
    from m7mlx_serve.errors import report
    from m7mlx_serve.limits import Limits, rows_memory
    from m7mlx_serve.models import Keeping, Models
    from m7mlx_serve.prefixes import PrefixFolder

    _check_numbers(args)
    keys = _read_keys(args.api_key_file)
    hosts = _host_names(args.host, args.allow_host, keys)
    if args.max_memory is not None:
        limit_memory(args.max_memory)
    limits = Limits(args.rows, args.queue, args.keep, args.kv_bits, args.draft_rows, args.max_kv_size)
    # A port that is taken is told before the model loads, which may take minutes. Of several
    # processes, only the first opens it.
    bound = None if is_launched() else bind(args.host, args.port)
    given = {name: resolve(model) for name, model in _named_models(args).items()}
    folder = next(iter(given.values()), None)
    world = None if folder is None else join(args.parallel, lambda: ModelConfig.from_folder(folder))
    if world is not None and folder is not None:
        if len(given) > 1 or args.models_dir is not None:
            raise InputError("several processes share one model: give one --model, and no --models-dir")
        if world.rank:
            return run_rank(world, folder)
    bound = bound or bind(args.host, args.port)
    listener: Listener | None = None

    def stop() -> None:
        if listener is not None:
            listener.should_exit = True

    catalog = Catalog(given, args.models_dir)
    for name in args.pin:
        if catalog.folder(name) is None:
            raise InputError(f"--pin {name}: there is no such model; there are {', '.join(catalog.names[:10])}")
    keeping = Keeping(args.pin, args.idle_unload, args.max_seconds)
    place = PrefixFolder(args.prefix_dir or _prefix_dir(), args.prefix_disk)
    models = Models(catalog, limits, keeping, world, stop, place if args.prefix_disk else None)
    first = list(dict.fromkeys([*list(given)[:1], *args.pin]))
    if first:
        say(f"loading {', '.join(first)} …")
    try:
        models.start(first)
    except KeyboardInterrupt:  # loading goes on, and would abort a process that ends as usual
        _leave(EXIT_INTERRUPTED, "stopped while loading")
    try:
        served = Served(args.max_tokens, args.max_seconds)
        server = Server(models, served, hosts, keys, _origins(args.allow_origin))
        gc.collect()
        gc.freeze()  # what exists now stays: each look through it would take a tenth of a second
        listen(bound, BACKLOG)
        url = f"http://{in_url(args.host)}:{bound.getsockname()[1]}"
        weights = sum(slot.engine.weights for slot in models.loaded)
        most = sum(rows_memory(slot.engine.model, limits) for slot in models.loaded)
        others = len(catalog.names) - len(models.loaded)
        more = f" · {others} more to be loaded when asked for" if others else ""
        say(f"m7mlx is at {url} · {_describe_memory(weights, most, world)}{more} · Ctrl-C ends it")
        listener = Listener(server.app, models.cancel)
        if models.alive:
            listener.run(sockets=[bound])
    finally:
        if not models.close():
            _leave(EXIT_FAILED, "ended in the middle of a forward pass that took too long")
    if models.failure is not None:
        report(models.failure)
        raise RunError("the thread that computes has ended, which must not happen; start the server again")
    return None


def _named_models(args: argparse.Namespace) -> dict[str, str]:
    """The models that are given, by the names that clients use. Raises InputError."""
    models = args.model or ([] if args.models_dir is not None else ["mistral"])
    if len(args.name) > len(models):
        raise InputError(f"--name {args.name[len(models)]}: there is no --model that it could name")
    names = [*args.name, *models[len(args.name) :]]
    if len(set(names)) < len(names):
        raise InputError("two models have the same name; give each a --name of its own")
    return dict(zip(names, models, strict=True))


def duration(text: str) -> float:
    """The seconds of a time like 30s, 10m or 2h. Raises argparse.ArgumentTypeError."""
    found = re.fullmatch(r"([0-9]{1,6})([smh]?)", text)
    if not found or not int(found[1]):
        raise argparse.ArgumentTypeError(f"a time is a number and s, m or h, as 10m: not {text!r}")
    return int(found[1]) * {"": 1, "s": 1, "m": 60, "h": 3600}[found[2]]


def _prefix_dir() -> Path:
    """Where ended conversations are kept if nobody says: $M7MLX_PREFIXES, or the user's cache."""
    given = os.environ.get("M7MLX_PREFIXES")
    return user_path(given) if given else cache_dir() / "prefixes"


def _describe_memory(weights: int, keys: int, world: World | None) -> str:
    """The bytes of weights, and of keys and values, in words."""
    memory = f"{in_gigabytes(weights, 2)} of weights, at most {in_gigabytes(keys, 2)} of keys and values"
    if world is None:
        return memory
    return f"{memory} in each of {world.size} processes ({world.shard.mode} parallel)"


def _check_numbers(args: argparse.Namespace) -> None:
    """Raise InputError for a number that is out of range."""
    for name, low in (("rows", 1), ("queue", 0), ("keep", 0), ("draft_rows", 0)):
        if not low <= getattr(args, name) <= 1024:
            option = name.replace("_", "-")
            raise InputError(f"--{option} must lie between {low} and 1024, not {getattr(args, name)}")
    if args.max_kv_size is not None and args.max_kv_size < _LEAST_KEYS:
        raise InputError(f"--max-kv-size must be at least {_LEAST_KEYS}, not {args.max_kv_size}")
    if args.max_tokens is not None and args.max_tokens < 1:
        raise InputError(f"--max-tokens must be at least 1, not {args.max_tokens}")
    if not 0 < args.max_seconds <= 86_400:
        raise InputError(f"--max-seconds must lie between 0 and 86400, not {args.max_seconds:g}")
    if args.prefix_disk < 0:
        raise InputError(f"--prefix-disk must be at least 0, not {args.prefix_disk / 10**9:g}")
    if not 0 <= args.port < 1 << 16:
        raise InputError(f"--port must lie between 0 and 65535, not {args.port}")


def _leave(status: int, why: str) -> NoReturn:
    """End the process at once, whatever other threads do."""
    say(f"{PROG}: {why}")
    os._exit(status)


def _read_keys(path: Path | None) -> list[str]:
    """The keys in the file, one a line; empty lines, and those that begin with #, hold none."""
    if path is None:
        return []
    try:
        lines = path.expanduser().read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"--api-key-file: {path} cannot be read ({error})") from None
    keys = [line.strip() for line in lines if line.strip() and not line.startswith("#")]
    for key in keys or [""]:
        if len(key) < 16 or not key.isascii() or not key.isprintable():
            raise InputError(f"--api-key-file: each line of {path} must be a key of at least 16 ASCII characters")
    if len(keys) > _MOST_KEYS:
        raise InputError(f"--api-key-file: {path} has more than {_MOST_KEYS} keys")
    return keys


def _origins(allowed: Sequence[str]) -> set[str]:
    """The origins of pages that may ask. Raises InputError for what is none."""
    for origin in allowed:
        if not re.fullmatch(r"[A-Za-z][A-Za-z0-9+.-]*://[^/?#\s]+", origin):
            raise InputError(f"--allow-origin {origin}: an origin is a scheme and a host, as https://example.org")
    return {origin.lower() for origin in allowed}


def _host_names(host: str, allowed: Sequence[str], keys: Sequence[str]) -> set[str]:
    """The names that Host headers may have. Raises InputError if `host` needs a key."""
    if not keys and not is_loopback(host):
        raise InputError(f"--host {host} can be reached from other machines: give a key with --api-key-file")
    names = {*_LOOPBACK, "[::1]", host.lower(), f"[{host.lower()}]"} - {"0.0.0.0", "::", "[::]"}
    return names | {name.lower() for name in allowed}
