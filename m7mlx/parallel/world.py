"""One model over several processes, on one machine or many, started by `mlx.launch`.

    mlx.launch -n 2 --backend ring -- m7mlx-chat -p "Hello" --model mistral

Each process holds a shard of the model (`m7mlx.shard`). The first one is the program that the user
sees; the others do what it tells them (`follow`): the same passes over the same tokens, in the same
order.
"""

from __future__ import annotations

import json
import os
import signal
import socket
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import mlx.core as mx

from m7mlx.answer import Piece
from m7mlx.cache import CacheOptions, RollingCache
from m7mlx.errors import InputError, M7Error, RunError
from m7mlx.exchange import Exchange
from m7mlx.generation import stream_answer
from m7mlx.loading import load
from m7mlx.model import Mistral
from m7mlx.parallel import channel
from m7mlx.parallel.channel import Channel
from m7mlx.parallel.launch import is_launched
from m7mlx.parallel.sums import sum_products
from m7mlx.request import Request, prepare
from m7mlx.rows import Told
from m7mlx.scheduler import Scheduler
from m7mlx.shard import Mode, Shard
from m7mlx.tokens.tokenizer import Tokenizer


@dataclass(frozen=True)
class World:
    """The processes of a run; `rank` is this one's number."""

    shard: Shard
    group: mx.distributed.Group
    channel: Channel

    @property
    def rank(self) -> int:
        return self.shard.rank

    @property
    def size(self) -> int:
        return self.shard.size

    def load(self, name: str | Path, progress: Callable[[int, int], None] | None = None) -> tuple[Mistral, Tokenizer]:
        """Load this rank's shard of a model, as `m7mlx.load`; return when all ranks have theirs."""
        model, tokenizer = load(name, shard=self.shard, progress=progress)
        model.exchange = Exchange(self.shard, self.group)
        if self.shard.mode == "tensor":
            sum_products(model, self.group)
        if self.rank:
            self.channel.tell({"do": "ready"})
        else:
            for _ in range(self.size - 1):
                self.channel.hear()
        return model, tokenizer

    def share(self, request: Request, options: CacheOptions) -> Request:
        """Let the others run the passes of an answer that this rank is about to begin.

        request  prepared for an empty cache with these options; what comes back has a seed for all
        """
        request = seeded(request)
        self.channel.tell({"do": "answer", "cache": options, "request": request.to_dict()})
        return request

    def close(self) -> None:
        """End the run, on the thread that computes; what others wait for is finished first."""
        mx.synchronize()
        self.channel.close()


def join(mode: Mode | None, config_of: Callable[[], Any]) -> World | None:
    """Meet the other processes; None where there are none.

    mode       None divides heads where they can be divided, else layers
    config_of  gives the model's ModelConfig

    Raises RunError if they cannot be met.
    """
    if not is_launched():
        return None
    try:
        group = mx.distributed.init(strict=True)
    except (RuntimeError, ValueError) as error:
        if os.environ.get("MLX_HOSTFILE") and not Path(os.environ["MLX_HOSTFILE"]).read_text().strip():
            return None  # one process alone
        raise RunError(f"the processes of this run cannot meet: {' '.join(str(error).split())}") from None
    rank, size = group.rank(), group.size()
    if size == 1:
        return None
    shard = Shard(mode or _fitting(config_of(), size), rank, size)
    shard.config(config_of())  # raises, on all of them
    return World(shard, group, _channel(rank, size, group))


def _fitting(config: Any, size: int) -> Mode:
    try:
        Shard("tensor", 0, size).config(config)
    except InputError:
        return "pipeline"
    return "tensor"


def _channel(rank: int, size: int, group: mx.distributed.Group) -> Channel:
    """Open the line: all know the first rank's address from the start; port and key go by MLX."""
    address = _first_address()

    def share(numbers: list[int]) -> list[int]:
        mine = mx.array(numbers if rank == 0 else [0] * len(numbers), mx.int32)
        found: list[int] = mx.distributed.all_sum(mine, group=group).tolist()  # type: ignore[assignment]
        return found

    if rank == 0:
        return channel.open_channel(size, address, lambda port, key: share([port, *key]))
    port, *key = share([0] * (1 + channel.KEY_BYTES))
    return channel.join_channel(rank, address, port, bytes(key))


def _first_address() -> str:
    """Find where the first rank listens: M7MLX_FIRST_HOST, or what started the processes.

    Raises RunError where there is no such place.
    """
    name = os.environ.get("M7MLX_FIRST_HOST") or _given_address() or socket.gethostname()
    try:
        found = socket.getaddrinfo(name.strip("[]"), None, type=socket.SOCK_STREAM)
        return str(min(found, key=lambda one: one[0] != socket.AF_INET)[4][0])
    except (OSError, UnicodeError):
        raise RunError(f"no machine is called {name!r}; M7MLX_FIRST_HOST names the first one's address") from None


def _given_address() -> str:
    if hosts := os.environ.get("MLX_HOSTFILE"):
        try:
            first = json.loads(Path(hosts).read_text())[0]
            return str(first[0] if isinstance(first, list) else first).rpartition(":")[0]
        except (OSError, ValueError, LookupError):
            raise RunError(f"{hosts} does not list hosts as MLX's ring has them") from None
    for name in ("MLX_JACCL_COORDINATOR", "NCCL_HOST_IP"):
        if given := os.environ.get(name):
            return given.rpartition(":")[0] if "]" in given or given.count(":") == 1 else given
    return ""


# --- the scheduler of all ranks -------------------------------------------------------------------


class Leader:
    """A Scheduler, as far as a server uses it, that the other ranks run as well."""

    def __init__(self, scheduler: Scheduler, world: World) -> None:
        self._scheduler, self._channel = scheduler, world.channel
        self._channel.tell({"do": "serve", **scheduler.options})

    @property
    def running_and_waiting(self) -> tuple[int, int]:
        return self._scheduler.running_and_waiting

    def add(self, request: Request) -> int:
        request = seeded(self._scheduler.prepare(request))
        self._channel.tell({"do": "add", "request": request.to_dict()})
        return self._scheduler.admit(request)

    def cancel(self, number: int) -> Piece | None:
        self._channel.tell({"do": "cancel", "number": number})
        return self._scheduler.cancel(number)

    def step(self) -> tuple[Told, bool]:
        self._channel.tell({"do": "step"})
        told, more = self._scheduler.step()
        ended = [(number, self.cancel(number)) for number in self._scheduler.broken()]
        return told + [(number, piece) for number, piece in ended if piece is not None], more


def seeded(request: Request) -> Request:
    """Return the request with a seed that all ranks can draw from."""
    if request.sampling.seed is not None:
        return request
    return replace(request, sampling=replace(request.sampling, seed=int.from_bytes(os.urandom(7), "big")))


def follow(world: World, name: str | Path) -> None:
    """Load this rank's shard and do what the first rank tells, until that ends this process."""
    model, tokenizer = world.load(name)
    scheduler: Scheduler | None = None
    while True:
        told = world.channel.hear()
        match told.pop("do"):
            case "serve":
                scheduler = Scheduler(model, tokenizer, **told)
            case "add" if scheduler:
                scheduler.admit(Request.from_dict(told["request"]))
            case "cancel" if scheduler:
                scheduler.cancel(told["number"])
            case "step" if scheduler:
                scheduler.step()
            case "answer":
                _answer(model, tokenizer, Request.from_dict(told["request"]), model.new_cache(**told["cache"]))


def _answer(model: Mistral, tokenizer: Tokenizer, request: Request, cache: RollingCache) -> None:
    """Run the passes of an answer, for the rank that shows it."""
    limit = prepare(request, model, tokenizer, cache).max_tokens
    if limit != request.max_tokens:
        raise RunError(f"this machine's memory holds {limit} tokens of the answer, not {request.max_tokens}")
    for _ in stream_answer(model, tokenizer, request, cache):
        pass


def run_rank(world: World, name: str | Path) -> int:
    """Run the program of a rank that is not the first; return its exit status.

    What goes wrong is said in one line, and ends the run.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches all; the first says when to end
    try:
        follow(world, name)
    except M7Error as error:
        channel.die(f"process {world.rank}: {error}")
    except (RuntimeError, MemoryError) as error:
        channel.die(f"process {world.rank} failed: {' '.join(str(error).split())}")
    return 0
